// Streaming top-k search: for every query the best chunks of its past by <q, c>, on tensor cores. No score
// is ever stored.
//
//   search_norms_kernel     per 64 chunks, the largest norm: for chunks of any norm only (search_exact.cuh)
//   search_kernel           everything else, for k up to 236
//   search_exact_kernel     above, all rows by canonical scores alone
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
//   candidates -> results, in the same block (search_finish.cuh)
//
// Bytes: chunks come from L2 once per 128 queries, C E / 64 bytes per query in 16 bits; queries once. FLOPs:
// 2 C E per query, of which causality saves half.
//
// Large k takes several passes over the chunks. Each skips what ranks above the worst pair that the one
// before it kept: quick products come out the same in every pass, so the passes enumerate one ranking.
//
// When there are few queries, blocks share them and split the chunks. Each leaves its candidates in memory
// and draws a ticket; the last one finishes the rows of all.
#pragma once

#include "cuda/bag.cuh"
#include "cuda/device.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/search_finish.cuh"
#include "cuda/search_rows.cuh"
#include "cuda/search_tile.cuh"

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

struct ChunkRange {
  int begin, end;
};

// What the queries of a tile may retrieve between them. Chunk rows of later queries lie behind those of
// earlier ones.
__device__ __forceinline__ ChunkRange chunks_of_tile(const SearchRows& rows, int64_t first_query) {
  const int64_t last_query =
      first_query + kSearchRows < rows.queries ? first_query + kSearchRows - 1 : rows.queries - 1;
  const QueryPlace first = rows.place(first_query), last = rows.place(last_query);
  return {static_cast<int>(first.chunk_begin), static_cast<int>(last.chunk_begin + last.eligible)};
}

// The part that a block looks at, in steps of 64.
__device__ __forceinline__ ChunkRange chunks_of_split(const ChunkRange& all, int splits, int split) {
  const int64_t steps = (all.end - all.begin + kSearchChunks - 1) / kSearchChunks;
  const int64_t share = (steps + splits - 1) / splits * kSearchChunks;
  const int64_t from = all.begin + split * share, to = from + share < all.end ? from + share : all.end;
  return {static_cast<int>(from < all.end ? from : all.end), static_cast<int>(to)};
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

// The worst pair that each of a lane's rows has kept.
struct KeptRows {
  float worst[2];
  int worst_chunk[2];
};

// Nor do those that an earlier pass kept: the ones that do not rank below the worst of them.
template <int kColumns>
__device__ __forceinline__ void hide_kept(float (&acc)[kColumns][4], const KeptRows& kept, int first) {
  const int column = first + threadIdx.x % kQuad * 2;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!ranks_above(kept.worst[i / 2], kept.worst_chunk[i / 2], acc[n][i], column + n * 8 + i % 2))
        acc[n][i] = kNoScore;
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

// Where the block stands. In shared memory, for the loop has no registers to spare.
struct SearchBlock {
  SearchTileId id;
  ChunkRange all, own;  // of the tile, and of the split
  int tile, split;      // of the launch
};

template <class T>
__device__ __forceinline__ void find_block(const SearchParams<T>& p, SearchBlock& block) {
  const unsigned splits = static_cast<unsigned>(p.splits);
  block.split = static_cast<int>(blockIdx.x % splits);
  // Late queries see most: they go first.
  block.tile = static_cast<int>(p.rows.tiles) - 1 - static_cast<int>(blockIdx.x / splits);
  const SearchTileId id = search_tile_id(p.rows, p.rows.first_tile + block.tile);
  const ChunkRange all = chunks_of_tile(p.rows, id.query), own = chunks_of_split(all, p.splits, block.split);
  block.id.batch = id.batch, block.id.head = id.head, block.id.query = id.query;
  block.all.begin = all.begin, block.all.end = all.end;
  block.own.begin = own.begin, block.own.end = own.end;
}

// A lane's part of its rows' bags: to shared memory if they are all the candidates there are.
template <class Config, class T, class Bags>
__device__ __forceinline__ void store_bags(const SearchParams<T>& p, const SearchBlock& block,
                                           const LaneRows& mine, int pass, const Bags& bags,
                                           SearchStorage<Config::kCandidates>& storage) {
  const int t = threadIdx.x % kQuad;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row_in_tile(h);
    const int64_t of_launch = static_cast<int64_t>(block.tile) * kSearchRows + row;
    const bool alone = p.groups() == 1;
    const int64_t group = of_launch * p.groups() + pass * p.splits + block.split;
    int32_t* to = alone ? storage.candidates[row] : p.candidates + group * Config::kCandidates;
    float* cutoff = alone ? storage.cutoff + row : p.cutoffs + of_launch * p.splits + block.split;
#pragma unroll
    for (int i = 0; i < Config::kPerLane; ++i)
      to[t * Config::kPerLane + i] = bags[h].score[i] == kLowest ? -1 : bags[h].chunk[i] - mine.begin[h];
    if (t == 0) *cutoff = bags[h].worst;
  }
}

// What the block knows of its rows, for SearchFinish.
template <class T, class Storage>
__device__ __forceinline__ void store_rows(const SearchParams<T>& p, const SearchBlock& block,
                                           const LaneRows& mine, Storage& storage) {
  if (threadIdx.x % kQuad == 0)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      storage.begin[row_in_tile(h)] = mine.begin[h];
      storage.eligible[row_in_tile(h)] = mine.end[h] - mine.begin[h];
    }
  if (threadIdx.x == 0) storage.uncertain_rows = storage.joined = 0;
  if (!p.norms) return;
  float largest = 0;
  const float* norms = p.norms + (block.id.batch * p.rows.heads + block.id.head) * p.rows.steps();
  for (int i = block.all.begin / kSearchChunks + static_cast<int>(threadIdx.x);
       i * kSearchChunks < block.all.end; i += kSearchThreads)
    largest = fmaxf(largest, norms[i]);
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  if (threadIdx.x % kWarpSize == 0) storage.largest[threadIdx.x / kWarpSize] = largest;
}

// One pass of a block over its part of the chunks.
template <class Config, class T, class Bags>
__device__ __forceinline__ void search_chunks(const SearchParams<T>& p, const SearchBlock& block,
                                              const LaneRows& mine, bool is_later_pass, const KeptRows& kept,
                                              Bags& bags, unsigned char* shared) {
  using Tile = typename Config::Tile;
  const SearchTileId& id = block.id;
  const ChunkRange& range = block.own;
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
    if constexpr (!Config::kPinned)
      if (is_later_pass) hide_kept(acc, kept, first);
    offer_tile(acc, first, bags);
  }
  __syncthreads();  // the stages are done with: others take their place
}

// All of a block's work. Returns whether it was the one to finish the rows: their results are there for all
// its threads, in shared memory too if Storage keeps them.
template <class Config, class Storage, class T>
__device__ __forceinline__ bool search_rows(const SearchParams<T>& p, SearchBlock& block,
                                            unsigned char* shared) {
  static_assert(sizeof(Storage) <= Config::kSharedBytes, "the end takes the place of the stages");
  Storage& storage = *reinterpret_cast<Storage*>(shared);
  if (threadIdx.x == 0) find_block(p, block);
  __syncthreads();
  const LaneRows mine = lane_rows(p.rows, block.id.query);
  Bag<Config::kPerLane> bags[2];
  KeptRows kept;
  for (int pass = 0; pass < (Config::kPinned ? 1 : p.passes); ++pass) {
    bags[0].clear(), bags[1].clear();
    search_chunks<Config>(p, block, mine, pass > 0, kept, bags, shared);
    store_bags<Config>(p, block, mine, pass, bags, storage);
    if constexpr (!Config::kPinned) {
#pragma unroll
      for (int h = 0; h < 2; ++h) kept.worst[h] = bags[h].worst, kept.worst_chunk[h] = bags[h].worst_chunk;
    }
  }
  if (p.splits > 1) {
    __syncthreads();  // the block's candidates are stored
    if (threadIdx.x == 0) {
      uint32_t* ticket = p.tickets + p.rows.first_tile + block.tile;
      storage.is_last = ptx::atom_add_acq_rel_gpu(ticket, 1) + 1 == static_cast<uint32_t>(p.splits);
    }
    __syncthreads();
  }
  if (p.splits > 1 && !storage.is_last) return false;
  store_rows(p, block, mine, storage);
  __syncthreads();  // whoever finishes a row finds it and its candidates
  SearchFinish<T, Storage>{p, block.id, storage, block.tile}.run();
  return true;
}

template <class Config>
__global__ void __launch_bounds__(kSearchThreads, Config::kMinBlocks)
    search_kernel(const __grid_constant__ SearchParams<typename Config::Element> p) {
  RESONA_DYNAMIC_SHARED(shared);
  RESONA_SHARED(SearchBlock, block);
  ptx::griddepcontrol_wait();
  search_rows<Config, SearchStorage<Config::kCandidates>>(p, block, shared);
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
