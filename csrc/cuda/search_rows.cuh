// What the kernels of the search share: their parameters, and where a row stands.
#pragma once

#include "common/filter.h"
#include "cuda/bag.cuh"
#include "cuda/device.cuh"
#include "cuda/search_key.cuh"
#include "cuda/search_tile.cuh"
#include "cuda/sequences.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

// The rows of one launch: tiles of 128 queries, numbered over batch entries, heads and queries.
struct SearchRows {
  int64_t batch, queries, heads, dim;   // B, T, R, E
  int64_t context, chunk_size, chunks;  // L, S, C
  int64_t first_tile, tiles;
  PackedSequences packed;  // B == 1 if there are any

  __device__ __forceinline__ int64_t tiles_per_head() const {
    return (queries + kSearchRows - 1) / kSearchRows;
  }
  __device__ __forceinline__ int64_t steps() const { return (chunks + kSearchChunks - 1) / kSearchChunks; }
  __device__ __forceinline__ QueryPlace place(int64_t query) const {
    if (query >= queries) return {0, 0, 0};
    return place_of_query(packed, query, queries, context, chunk_size, chunks);
  }
};

struct SearchTileId {
  int64_t batch, head, query;  // the first of its queries
};

__device__ __forceinline__ SearchTileId search_tile_id(const SearchRows& rows, int64_t tile) {
  const int64_t group = tile / rows.tiles_per_head();
  return {group / rows.heads, group % rows.heads, tile % rows.tiles_per_head() * kSearchRows};
}

struct SearchResults {
  int64_t top_k;
  int32_t* indices;  // [B, T, R, k]
  float* scores;     // [B, T, R, k]

  __device__ __forceinline__ int64_t slots_of(const SearchRows& rows, const SearchTileId& id, int row) const {
    return ((id.batch * rows.queries + id.query + row) * rows.heads + id.head) * top_k;
  }
};

template <class T>
struct SearchParams {
  SearchRows rows;
  SearchOperand<T> query;  // [B, T, R, E]
  SearchOperand<T> chunk;  // [B, C, R, E]
  const float* norms;      // [B, R, ceil(C / 64)], null: unit chunks
  FilterError error;       // of the quick products
  SearchResults results;
  uint16_t* tile_counts;  // [all tiles, count_pitch]: see IndexProblem; null: not wanted
  int count_pitch;

  // Of several passes or splits, for the rows of the launch; else candidates never leave the block.
  int splits, passes;
  int32_t* candidates;  // [tiles * 128, passes * splits, candidates of a bag]; within the sequence, or -1
  float* cutoffs;       // [tiles * 128, splits]
  uint32_t* tickets;    // of all tiles, 0 on entry: splits that are done

  __device__ __forceinline__ int groups() const { return passes * splits; }
};

// Key 0: an unused slot. The results of a block may be in shared memory too.
__device__ __forceinline__ void write_slot(const SearchResults& results, int64_t at, uint64_t key) {
  results.indices[at] = key == 0 ? -1 : chunk_of_key(key);
  results.scores[at] = key == 0 ? kLowest : score_of_key(key);
}

}  // namespace resona::cuda
