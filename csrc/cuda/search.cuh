// Streaming top-k search: for every query the best chunks of its past by <q, c>, on tensor cores. No score
// is ever stored.
//
//   search_norms_kernel     per 64 chunks, the largest norm         for the bound on quick products
//   search_kernel           candidates: 128 queries x 64 chunks a step, further passes for large k
//   search_refine_kernel    canonical scores of the candidates, the best k of them, and: are they certain?
//   search_exact_kernel     the rows that were not, or all rows, by canonical scores alone
//
// search_kernel, a block of 8 warps on 128 queries of one batch entry and retrieval head:
//
//   E <= 128, 16 bit   queries in registers for good (pinned); a step is 64 chunks
//   any other E        a step is 64 chunks x 128 bytes of their rows, and the same columns of the queries
//
//   for each step                                                   cp.async, kStages in flight
//     acc += Q C^T                                     mma.sync, 16 x 64 per warp, fp32 (3xTF32 for fp32)
//     if the rows are complete
//       the row's largest of 64 against the worst of its bag            2 x 16 maxima, one vote
//       rarely: offer the better ones to the bag (bag.cuh)
//   bag -> candidates, its worst score -> cutoff: every chunk outside has a quick product <= cutoff
//
// Bytes: chunks come from L2 once per 128 queries, C E / 64 bytes per query in 16 bits; queries once. FLOPs:
// 2 C E per query, of which causality saves half.
//
// When there are few queries, blocks share them and split the chunks; every split leaves its own candidates.
// Pass p > 0 skips what ranks above the worst pair that pass p - 1 kept: quick products come out the same in
// every pass, so the passes enumerate one ranking.
#pragma once

#include "cuda/bag.cuh"
#include "cuda/device.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/search_tile.cuh"
#include "cuda/sequences.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

template <class T, bool kPinnedQueries, int kBagPerLane>
struct SearchConfig {
  using Element = T;
  using Tile = SearchTile<T, kPinnedQueries>;
  static constexpr bool kPinned = kPinnedQueries;
  static constexpr int kPerLane = kBagPerLane;
  static constexpr int kCandidates = kQuad * kPerLane;  // of a row and group
  static constexpr int kStages = kPinned ? 3 : 2;
  static constexpr int kSharedBytes = kStages * Tile::kStageBytes;
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks = 2;
};

// The rows of one launch: tiles of 128 queries, numbered over batch entries, heads and queries. Candidates
// and cutoffs are stored for these rows only, so a call with many rows can work in windows.
struct SearchRows {
  int64_t batch, queries, heads, dim;   // B, T, R, E
  int64_t context, chunk_size, chunks;  // L, S, C
  int64_t first_tile, tiles;
  PackedSequences packed;  // B == 1 if there are any

  __device__ __forceinline__ int64_t tiles_per_head() const {
    return (queries + kSearchRows - 1) / kSearchRows;
  }
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

template <class T>
struct SearchParams {
  SearchRows rows;
  SearchOperand<T> query;  // [B, T, R, E]
  SearchOperand<T> chunk;  // [B, C, R, E]
  int32_t* candidates;     // [tiles * 128, passes * splits, kCandidates]; within the sequence, or -1
  float* cutoffs;          // [tiles * 128, passes * splits]
  int32_t* last;           // as cutoffs, null for one pass: the chunk rows that go with them
  uint32_t* count;         // of uncertain rows: the first pass clears it for search_refine_kernel
  int splits, pass, passes;

  __device__ __forceinline__ int64_t group(int64_t row, int at_pass, int split) const {
    return (row * passes + at_pass) * splits + split;
  }
};

// What a lane knows of its two rows, g = lane / 4 and g + 8 of the warp's sixteen.
struct LaneRows {
  int begin[2], end[2];  // chunk rows that the query may retrieve
};

__device__ __forceinline__ int row_in_tile(int h) {
  return threadIdx.x / kWarpSize * kWarpRows + threadIdx.x % kWarpSize / kQuad + 8 * h;
}

__device__ __forceinline__ LaneRows lane_rows(const SearchRows& rows, int64_t first_query) {
  LaneRows mine;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const QueryPlace place = rows.place(first_query + row_in_tile(h));
    mine.begin[h] = static_cast<int>(place.chunk_begin);
    mine.end[h] = static_cast<int>(place.chunk_begin + place.eligible);
  }
  return mine;
}

// The chunks that a block looks at, in steps of 64: what its queries may retrieve between them, shared out
// over the splits. Chunk rows of later queries lie behind those of earlier ones.
struct ChunkRange {
  int begin, end;
};

template <class T>
__device__ __forceinline__ ChunkRange chunks_of_split(const SearchParams<T>& p, int64_t first_query,
                                                      int split) {
  const int64_t last_query =
      first_query + kSearchRows < p.rows.queries ? first_query + kSearchRows - 1 : p.rows.queries - 1;
  const QueryPlace first = p.rows.place(first_query), last = p.rows.place(last_query);
  const int64_t begin = first.chunk_begin, end = last.chunk_begin + last.eligible;
  const int64_t steps = (end - begin + kSearchChunks - 1) / kSearchChunks;
  const int64_t share = (steps + p.splits - 1) / p.splits * kSearchChunks;
  const int64_t from = begin + split * share, to = from + share < end ? from + share : end;
  return {static_cast<int>(from < end ? from : end), static_cast<int>(to)};
}

// Columns outside a row's range get no score.
template <int kColumns>
__device__ __forceinline__ void hide_foreign(float (&acc)[kColumns][4], const LaneRows& mine, int first) {
  const int column = first + threadIdx.x % kQuad * 2;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = column + n * 8 + i % 2, h = i / 2;
      if (chunk < mine.begin[h] || chunk >= mine.end[h]) acc[n][i] = kNoScore;
    }
  }
}

// Nor do those that an earlier pass kept: the ones that do not rank below the worst of them.
template <int kColumns, class T>
__device__ __forceinline__ void hide_kept(float (&acc)[kColumns][4], const SearchParams<T>& p, int tile,
                                          int split, int first) {
  const int column = first + threadIdx.x % kQuad * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = static_cast<int64_t>(tile) * kSearchRows + row_in_tile(h);
    const int64_t before = p.group(row, p.pass - 1, split);
    const float worst = p.cutoffs[before];
    const int worst_chunk = p.last[before];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i)
        if (!ranks_above(worst, worst_chunk, acc[n][i], column + n * 8 + i % 2)) acc[n][i] = kNoScore;
    }
  }
}

// A warp's 16 x 64 products into the bags of its rows.
template <int kColumns, class Bags>
__device__ __forceinline__ void offer_tile(const float (&acc)[kColumns][4], int first, Bags& bags) {
  float most[2] = {kNoScore, kNoScore};
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    most[0] = fmaxf(most[0], fmaxf(acc[n][0], acc[n][1]));
    most[1] = fmaxf(most[1], fmaxf(acc[n][2], acc[n][3]));
  }
  // What is kept so far lies before this step, so an equal product ranks below it.
  if (!__any_sync(kAllLanes, most[0] > bags[0].worst || most[1] > bags[1].worst)) return;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Not `>`: within the step columns come out of order, and an equal product may be of a lower chunk.
      if (!__any_sync(kAllLanes, acc[n][i] >= bags[i / 2].worst)) continue;
#pragma unroll 1
      for (int t = 0; t < kQuad; ++t) {
        const float x = __shfl_sync(kAllLanes, acc[n][i], t, kQuad);
        bags[i / 2].offer(x, first + n * 8 + 2 * t + i % 2);
      }
    }
  }
}

template <class Config, class T, class Bags>
__device__ __forceinline__ void write_bags(const SearchParams<T>& p, const LaneRows& mine, int tile,
                                           int split, const Bags& bags) {
  const int t = threadIdx.x % kQuad;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = static_cast<int64_t>(tile) * kSearchRows + row_in_tile(h),
                  group = p.group(row, p.pass, split);
    int32_t* to = p.candidates + group * Config::kCandidates + t * Config::kPerLane;
#pragma unroll
    for (int i = 0; i < Config::kPerLane; ++i)
      to[i] = bags[h].score[i] == kLowest ? -1 : bags[h].chunk[i] - mine.begin[h];
    if (t > 0) continue;
    p.cutoffs[group] = bags[h].worst;
    if (p.last) p.last[group] = bags[h].worst_chunk;
  }
}

template <class Config>
__global__ void __launch_bounds__(kSearchThreads, Config::kMinBlocks)
    search_kernel(SearchParams<typename Config::Element> p) {
  RESONA_DYNAMIC_SHARED(shared);
  using Tile = typename Config::Tile;
  ptx::griddepcontrol_wait();
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.pass == 0) *p.count = 0;
  const int split = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.splits));
  const int tile =
      static_cast<int>(p.rows.tiles) - 1 -
      static_cast<int>(blockIdx.x / static_cast<unsigned>(p.splits));  // late queries see most: they go first
  const SearchTileId id = search_tile_id(p.rows, p.rows.first_tile + tile);
  const LaneRows mine = lane_rows(p.rows, id.query);
  const ChunkRange range = chunks_of_split(p, id.query, split);
  Bag<Config::kPerLane> bags[2];
  bags[0].clear(), bags[1].clear();

  const int64_t queries = p.rows.queries - id.query;
  Tile products(p.query.at(id.batch, id.query, id.head), p.query.row_stride, p.query.vector,
                queries < kSearchRows ? static_cast<int>(queries) : kSearchRows,
                p.chunk.at(id.batch, 0, id.head), p.chunk.row_stride, p.chunk.vector, range.begin, range.end,
                static_cast<int>(p.rows.dim), shared);
  products.template start<Config::kStages>();
  for (int first = range.begin; first < range.end; first += kSearchChunks) {
    float acc[Tile::kColumns][4] = {};
    const int behind = first + kSearchChunks;
    const bool sees_some =
        (first < mine.end[0] && behind > mine.begin[0]) || (first < mine.end[1] && behind > mine.begin[1]);
    const bool wanted = __any_sync(kAllLanes, sees_some);
    products.template next<Config::kStages>(acc, wanted);
    if (!wanted) continue;
    const bool sees_all =
        first >= mine.begin[0] && behind <= mine.end[0] && first >= mine.begin[1] && behind <= mine.end[1];
    if (!__all_sync(kAllLanes, sees_all)) hide_foreign(acc, mine, first);
    if constexpr (!Config::kPinned) {
      if (p.pass > 0) hide_kept(acc, p, tile, split, first);
    }
    offer_tile(acc, first, bags);
  }
  write_bags<Config>(p, mine, tile, split, bags);
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, pinned queries, bag slots per lane).
#define RESONA_SEARCH_INSTANCES(X) \
  X(float, false, 1)               \
  X(float, false, 3)               \
  X(float, false, 5)               \
  X(Half, false, 1)                \
  X(Half, false, 3)                \
  X(Half, false, 5)                \
  X(Half, true, 1)                 \
  X(Half, true, 3)                 \
  X(Half, true, 5)                 \
  X(BFloat16, false, 1)            \
  X(BFloat16, false, 3)            \
  X(BFloat16, false, 5)            \
  X(BFloat16, true, 1)             \
  X(BFloat16, true, 3)             \
  X(BFloat16, true, 5)

}  // namespace resona::cuda
