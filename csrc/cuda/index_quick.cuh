// The inverted index where keys are few: counts of each tile of queries, then every slot to its place.
//
//   tile      128 queries of one batch entry and retrieval head, numbered (b, r, query tile) as in the search
//   counts    [tiles][C rounded up to 8], 16 bits: slots of the tile that name chunk c
//
//                              chunks                  index_tile_counts_kernel, a block per tile:
//                         0 3 1 0 2 0 . .              a histogram in shared memory, written as a whole row.
//      tiles of           1 0 4 0 1 1 . .              Not launched where the search has written the rows.
//      one head   own --> 2 2 0 1 1 0 . .
//                         1 0 2 2 0 3 . .              index_place_kernel, a block per few tiles
//                         (block_tiles):
//                         -----------
//      sums of columns    4 5 7 3 4 4                  all rows      -> a scan over keys: where lists begin
//      of rows above own  1 3 5 0 3 1                  rows before   -> where the block's own slots go on
//
//      then a warp per own tile walks its slots in order, 32 at a time: match_any ranks the slots of a chunk
//      within the 32, and next[chunk], in shared memory, moves on
//
// A block sums the columns of its own head and of all before it, so the last one knows every list: it also
// writes offsets and the work list. Nobody waits for another block, and there is no global atomic; the order
// of the atomics in shared memory cannot matter, so the result is the same on every run.
//
// Bytes: 12 per slot and 2 per count; besides, each block reads its rows of the counts from L2, 16 bytes a
// thread and load. Chunks that no query of a row can have retrieved yet are skipped: half of all if the
// sequences are not packed. The plan holds blocks x counts to 128 MiB.
#pragma once

#include "cuda/device.cuh"
#include "cuda/index.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/scan.cuh"

namespace resona::cuda {

constexpr int kIndexQueries = 128;  // of a tile
constexpr int kIndexColumns = 8;    // counts of a 16-byte load

struct IndexTiles {
  IndexSlots slots;
  uint16_t* counts;     // [tiles][pitch]
  int64_t group_tiles;  // tiles of a batch entry and retrieval head: ceil(T / 128)
  int pitch;            // C rounded up to 8
};

// The slots of a tile: its query q's number j is slot `first + q * stride + j` of the problem.
struct IndexTile {
  int64_t query, first, stride;
  int64_t row;  // b T + t of its first query
  int queries;
};

__device__ __forceinline__ IndexTile index_tile(const IndexTiles& p, int64_t group, int64_t number) {
  const IndexSlots& s = p.slots;
  const int64_t query = number * kIndexQueries, left = s.queries - query;
  const int64_t row = group / s.heads * s.queries + query;
  return {query, (row * s.heads + group % s.heads) * s.top_k, s.heads * s.top_k, row,
          static_cast<int>(left < kIndexQueries ? left : kIndexQueries)};
}

// Chunk rows that a query may retrieve: the first in the low half, how many in the high one.
__device__ __forceinline__ uint32_t eligible_rows(const IndexSlots& s, int64_t query) {
  const QueryPlace place = s.place(query);
  return static_cast<uint32_t>(place.chunk_begin | place.eligible << 16);
}

// The chunk row of an index as the contract counts it, or -1: out of range, or not wholly in the past.
__device__ __forceinline__ int chunk_of(uint32_t eligible, int32_t index) {
  return index >= 0 && index < static_cast<int>(eligible >> 16) ? static_cast<int>(eligible & 0xffff) + index
                                                                : -1;
}

// ---- counts

struct IndexTileCountsConfig {
  static constexpr int kThreads = 256;
  static constexpr int kMostChunks = 4096;
  static constexpr int kRegisterCap = 48;
};

struct IndexTileCountsStorage {
  uint32_t counts[IndexTileCountsConfig::kMostChunks];
  uint32_t eligible[kIndexQueries];
};

static __global__ void __launch_bounds__(IndexTileCountsConfig::kThreads)
    index_tile_counts_kernel(IndexTiles p) {
  RESONA_SHARED(IndexTileCountsStorage, storage);
  for (int c = threadIdx.x; c < p.pitch; c += IndexTileCountsConfig::kThreads) storage.counts[c] = 0;
  ptx::griddepcontrol_wait();
  const IndexTile tile = index_tile(p, blockIdx.x / p.group_tiles, blockIdx.x % p.group_tiles);
  for (int q = threadIdx.x; q < tile.queries; q += IndexTileCountsConfig::kThreads)
    storage.eligible[q] = eligible_rows(p.slots, tile.query + q);
  __syncthreads();
  const int top_k = static_cast<int>(p.slots.top_k);
  for (int i = threadIdx.x; i < tile.queries * top_k; i += IndexTileCountsConfig::kThreads) {
    const int q = i / top_k, j = i % top_k;
    const int chunk = chunk_of(storage.eligible[q], p.slots.indices[tile.first + q * tile.stride + j]);
    if (chunk >= 0) ptx::atom_add_relaxed_cta(storage.counts + chunk, 1);
  }
  __syncthreads();
  uint16_t* row = p.counts + static_cast<int64_t>(blockIdx.x) * p.pitch;
  for (int c = threadIdx.x * kIndexColumns; c < p.pitch;
       c += IndexTileCountsConfig::kThreads * kIndexColumns) {
    const uint32_t* n = storage.counts + c;
    ptx::st_global_v4(row + c, {n[0] | n[1] << 16, n[2] | n[3] << 16, n[4] | n[5] << 16, n[6] | n[7] << 16});
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- places

struct IndexPlaceConfig {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / kWarpSize;  // so many tiles at most
  static constexpr int kMostKeys = kThreads * kIndexColumns;
  static constexpr int kRounds = 4;  // of 32 slots, loaded and matched together
  static constexpr int kRegisterCap = 64;
};

struct IndexPlaceParams {
  IndexTiles tiles;
  uint32_t* sorted_slots;  // [slots]
  uint32_t* list;          // [slots], null if not wanted
  int32_t* position;       // [slots], null if not wanted
  uint32_t *offsets, *tile_begin, *tile_totals;
  int64_t rows_per_query, tile_rows;  // rows of a list per query; rows of a tile of the work list
  int block_tiles, group_blocks;      // tiles of a block; blocks of a batch entry and retrieval head
};

// A strip is 8 neighbouring columns of one group's counts, a thread's share of the scan. Arrays by column
// are laid out [8][strips], so that neighbouring threads touch neighbouring words.
struct IndexBlock {
  int64_t group, first_tile;  // of the group's
  int tiles;                  // of its own
  int strips, group_strips;   // of all groups up to its own; of one
  uint32_t *totals, *next, *eligible;

  __device__ __forceinline__ IndexBlock(const IndexPlaceParams& p, unsigned char* shared) {
    const IndexTiles& t = p.tiles;
    const int64_t groups = t.slots.batch * t.slots.heads;
    group = blockIdx.x / p.group_blocks;
    first_tile = static_cast<int64_t>(blockIdx.x % p.group_blocks) * p.block_tiles;
    const int64_t left = group < groups ? t.group_tiles - first_tile : 0;
    tiles = static_cast<int>(left < p.block_tiles ? left : p.block_tiles);
    group_strips = t.pitch / kIndexColumns;
    strips = static_cast<int>(group < groups ? group + 1 : groups) * group_strips;
    totals = reinterpret_cast<uint32_t*>(shared);             // [8][strips]
    next = totals + strips * kIndexColumns;                   // [block_tiles][8][group_strips]
    eligible = next + static_cast<int64_t>(tiles) * t.pitch;  // [block_tiles][128]
  }

  __device__ __forceinline__ int own_strip(int strip) const {  // negative in groups before
    return strip - static_cast<int>(group) * group_strips;
  }
  __device__ __forceinline__ uint32_t& next_of(int tile, int strip, int column) const {
    return next[(tile * kIndexColumns + column) * group_strips + strip];
  }
};

// Sums of the eight columns. Two 16-bit counts share a word: the sum of words, modulo 2^32, is that of the
// low halves plus 2^16 times that of the high ones.
struct IndexColumnSums {
  uint32_t words[4] = {}, high[4] = {};

  __device__ __forceinline__ void add(uint4 x) {
    const uint32_t part[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] += part[i], high[i] += part[i] >> 16;
  }
  __device__ __forceinline__ uint32_t operator[](int column) const {
    return column % 2 ? high[column / 2] : words[column / 2] - (high[column / 2] << 16);
  }
};

// The first tile of a group whose queries may have retrieved a chunk of the strip.
__device__ __forceinline__ int64_t first_row(const IndexSlots& s, int64_t column) {
  if (s.packed.cu_seqlens) return 0;  // wrong ones may name any chunk
  const int64_t query = (column + 1) * s.chunk_size - s.context + s.queries + s.queries_behind;
  return query < 0 ? 0 : query / kIndexQueries;
}

__device__ __forceinline__ uint4 counts_at(const IndexTiles& p, int64_t group, int64_t tile, int strip) {
  const int64_t row = (group * p.group_tiles + tile) * p.pitch;
  return *reinterpret_cast<const uint4*>(p.counts + row + strip * kIndexColumns);
}

// Several threads share a strip if there are fewer strips than threads.
__device__ __forceinline__ void sum_columns(const IndexTiles& p, const IndexBlock& b) {
  if (b.strips == 0) return;
  const int thread = threadIdx.x, sharing = IndexPlaceConfig::kThreads / b.strips;
  if (thread >= b.strips * sharing) return;
  const int strip = thread % b.strips, own = b.own_strip(strip);
  const int group = strip / b.group_strips, in_group = strip % b.group_strips;
  IndexColumnSums sums;
  int64_t tile = first_row(p.slots, in_group * kIndexColumns) + thread / b.strips;
  if (own >= 0) {
#pragma unroll 4
    for (; tile < b.first_tile; tile += sharing) sums.add(counts_at(p, group, tile, in_group));
#pragma unroll
    for (int c = 0; c < kIndexColumns; ++c) ptx::atom_add_relaxed_cta(&b.next_of(0, own, c), sums[c]);
  }
#pragma unroll 4
  for (; tile < p.group_tiles; tile += sharing) sums.add(counts_at(p, group, tile, in_group));
#pragma unroll
  for (int c = 0; c < kIndexColumns; ++c) ptx::atom_add_relaxed_cta(b.totals + c * b.strips + strip, sums[c]);
}

struct IndexPlaceStorage {
  uint32_t warp_totals[IndexPlaceConfig::kWarps];
};

// From the sums to where each own tile's slots of a chunk go, and for the last block to the offsets.
__device__ __forceinline__ void scan_keys(const IndexPlaceParams& p, const IndexBlock& b,
                                          IndexPlaceStorage& storage) {
  const int strip = threadIdx.x, own = b.own_strip(strip);
  const bool is_strip = strip < b.strips, is_last = blockIdx.x == gridDim.x - 1;
  uint32_t counts[kIndexColumns], sum = 0, tile_sum = 0;
#pragma unroll
  for (int c = 0; c < kIndexColumns; ++c) {
    counts[c] = is_strip ? b.totals[c * b.strips + strip] : 0;
    sum += counts[c];
  }
  const BlockSums<uint32_t> begins = block_scan(sum, storage.warp_totals);
  if (is_strip && own >= 0) {
    uint32_t begin = begins.before;
#pragma unroll
    for (int c = 0; c < kIndexColumns; ++c) {
      b.next_of(0, own, c) += begin;
      begin += counts[c];
    }
    for (int t = 0; t + 1 < b.tiles; ++t) {
      IndexColumnSums of_tile;
      of_tile.add(counts_at(p.tiles, b.group, b.first_tile + t, own));
#pragma unroll
      for (int c = 0; c < kIndexColumns; ++c) b.next_of(t + 1, own, c) = b.next_of(t, own, c) + of_tile[c];
    }
  }
  if (!is_last) return;
  const auto row_tiles = [&](uint32_t count) {
    return static_cast<uint32_t>((count * p.rows_per_query + p.tile_rows - 1) / p.tile_rows);
  };
#pragma unroll
  for (int c = 0; c < kIndexColumns; ++c) tile_sum += row_tiles(counts[c]);
  const BlockSums<uint32_t> tiles = block_scan(tile_sum, storage.warp_totals);
  if (is_strip) {
    const int64_t chunks = p.tiles.slots.chunks, first = strip % b.group_strips * kIndexColumns;
    const int64_t key = strip / b.group_strips * chunks + first;
    uint32_t begin = begins.before, tile = tiles.before;
#pragma unroll
    for (int c = 0; c < kIndexColumns; ++c) {
      if (first + c >= chunks) break;
      p.offsets[key + c] = begin, p.tile_begin[key + c] = tile;
      begin += counts[c], tile += row_tiles(counts[c]);
    }
  }
  const int64_t keys = p.tiles.slots.keys();
  if (threadIdx.x == 0) p.offsets[keys] = begins.total, p.tile_begin[keys] = tiles.total;
  if (threadIdx.x <= keys / ScanConfig::kTile) p.tile_totals[threadIdx.x] = 0;
}

// A warp's own tile, 32 slots at a time and in their order.
__device__ __forceinline__ void place_slots(const IndexPlaceParams& p, const IndexBlock& b, int own) {
  constexpr int kRounds = IndexPlaceConfig::kRounds;
  const IndexSlots& s = p.tiles.slots;
  const IndexTile tile = index_tile(p.tiles, b.group, b.first_tile + own);
  const uint32_t* eligible = b.eligible + own * kIndexQueries;
  const int lane = threadIdx.x % kWarpSize, top_k = static_cast<int>(s.top_k);
  const int step_q = kWarpSize / top_k, step_j = kWarpSize % top_k;
  int q = lane / top_k, j = lane % top_k;
  for (int done = 0; done < tile.queries * top_k; done += kRounds * kWarpSize) {
    int row[kRounds], number[kRounds], chunk[kRounds];
    unsigned peers[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      row[r] = q, number[r] = j;
      chunk[r] = q < tile.queries ? chunk_of(eligible[q], s.indices[tile.first + q * tile.stride + j]) : -1;
      q += step_q, j += step_j;
      if (j >= top_k) j -= top_k, ++q;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) peers[r] = __match_any_sync(kAllLanes, chunk[r]);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int rank = __popc(peers[r] & ((1u << lane) - 1));
      uint32_t* next = nullptr;
      uint32_t at = 0;
      if (chunk[r] >= 0) {
        next = &b.next_of(own, chunk[r] / kIndexColumns, chunk[r] % kIndexColumns);
        at = *next + rank;
      }
      __syncwarp();  // places are taken before they move on
      if (next && rank == 0) *next = at + __popc(peers[r]);
      __syncwarp();
      if (row[r] >= tile.queries) continue;
      const int64_t slot = tile.first + row[r] * tile.stride + number[r];
      if (p.position) p.position[slot] = next ? static_cast<int32_t>(at) : -1;
      if (!next) continue;
      p.sorted_slots[at] = static_cast<uint32_t>(slot);
      if (p.list) p.list[at] = static_cast<uint32_t>(tile.row + row[r]);
    }
  }
}

static __global__ void __launch_bounds__(IndexPlaceConfig::kThreads) index_place_kernel(IndexPlaceParams p) {
  RESONA_DYNAMIC_SHARED(shared);
  RESONA_SHARED(IndexPlaceStorage, storage);
  const IndexBlock b(p, shared);
  const int thread = threadIdx.x;
  for (int i = thread; i < b.strips * kIndexColumns; i += IndexPlaceConfig::kThreads) b.totals[i] = 0;
  for (int i = thread; i < p.tiles.pitch; i += IndexPlaceConfig::kThreads) b.next[i] = 0;
  __syncthreads();  // zeros are there
  ptx::griddepcontrol_wait();
  for (int i = thread; i < b.tiles * kIndexQueries; i += IndexPlaceConfig::kThreads) {
    const int64_t query = b.first_tile * kIndexQueries + i;
    b.eligible[i] = query < p.tiles.slots.queries ? eligible_rows(p.tiles.slots, query) : 0;
  }
  sum_columns(p.tiles, b);
  __syncthreads();  // sums are there
  scan_keys(p, b, storage);
  __syncthreads();  // places are there
  if (thread / kWarpSize < b.tiles) place_slots(p, b, thread / kWarpSize);
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
