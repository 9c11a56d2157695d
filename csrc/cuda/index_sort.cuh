// The inverted index for any number of keys: a stable counting sort of the slots by their key.
//
// Up to 2047 keys take one pass; more take a pass for each 11 bits, lowest first, so any number has a path
// with the same kernels and the same workspace.
//
//   index_keys_kernel      slot -> key; unused or not eligible: the last key
//   per pass
//     index_count_kernel     per tile of 4096 slots, a histogram of the digit -> counts[digit][tile]
//     scan (scan.cuh)        -> where each tile's slots of a digit go
//     index_scatter_kernel   ranks within the tile: match_any in a warp, prefix over warps; moves the slots
//   index_lists_kernel     list[position] = query row, position[slot] = its inverse
//   index_offsets_kernel   per key: where its list begins (binary search), and its number of row tiles
//   scan                   -> where its row tiles begin
//
// Bytes per slot: 8 for the keys, 20 per pass, 16 for the lists; 8 per key. No atomics but counts in shared
// memory, whose order cannot matter: the result is the same on every run.
#pragma once

#include "cuda/device.cuh"
#include "cuda/index.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/scan.cuh"

namespace resona::cuda {

struct IndexConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kRounds = 16;
  static constexpr int kWarpSlots = kRounds * kWarpSize;
  static constexpr int kTile = kWarps * kWarpSlots;  // slots of a block
  static constexpr int kDigitBits = 11;
  static constexpr int kDigits = 1 << kDigitBits;
  static constexpr int kRegisterCap = 48;
  static_assert(kTile < 1 << 16, "counts within a tile are 16-bit");
};

// ---- keys

struct IndexKeysParams {
  IndexSlots slots;
  uint32_t* keys;  // [B, T, R, k]
};

// The chunk row of an index as the contract counts it, or -1: out of range, or not wholly in the past.
__device__ __forceinline__ int64_t chunk_row(const IndexSlots& slots, int64_t query, int32_t index) {
  const QueryPlace place = slots.place(query);
  return index >= 0 && index < place.eligible ? place.chunk_begin + index : -1;
}

static __global__ void __launch_bounds__(IndexConfig::kThreads) index_keys_kernel(IndexKeysParams p) {
  ptx::griddepcontrol_wait();
  const IndexSlots& s = p.slots;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; slot < s.count();
       slot += step) {
    const int64_t head = slot / s.top_k % s.heads, row = slot / (s.top_k * s.heads);
    const int64_t chunk = chunk_row(s, row % s.queries, s.indices[slot]);
    const int64_t group = row / s.queries * s.heads + head;
    p.keys[slot] = static_cast<uint32_t>(chunk < 0 ? s.keys() : group * s.chunks + chunk);
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- one pass of the sort

struct IndexPassParams {
  const uint32_t* keys;    // [count]
  const uint32_t* slots;   // [count], null in the first pass: slot i
  uint32_t* sorted_keys;   // [count]
  uint32_t* sorted_slots;  // [count]
  uint32_t* counts;        // [digits][tiles], scanned between the two kernels
  uint32_t* totals;        // of the scan
  int64_t count, tiles;
  int shift, bits;  // of the digit

  __device__ __forceinline__ int digit(uint32_t key) const { return key >> shift & ((1u << bits) - 1); }
};

struct IndexCountStorage {
  uint32_t counts[IndexConfig::kDigits];
};

static __global__ void __launch_bounds__(IndexConfig::kThreads) index_count_kernel(IndexPassParams p) {
  RESONA_SHARED(IndexCountStorage, storage);
  const int digits = 1 << p.bits;
  for (int d = threadIdx.x; d < digits; d += IndexConfig::kThreads) storage.counts[d] = 0;
  ptx::griddepcontrol_wait();
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * IndexConfig::kTile;
  for (int i = threadIdx.x; i < IndexConfig::kTile; i += IndexConfig::kThreads)
    if (first + i < p.count) ptx::atom_add_relaxed_cta(storage.counts + p.digit(p.keys[first + i]), 1);
  __syncthreads();
  for (int d = threadIdx.x; d < digits; d += IndexConfig::kThreads)
    p.counts[d * p.tiles + blockIdx.x] = storage.counts[d];
  ptx::griddepcontrol_launch_dependents();
}

struct IndexScatterStorage {
  uint16_t warp_counts[IndexConfig::kWarps][IndexConfig::kDigits];
  uint32_t begin[IndexConfig::kDigits];  // where this tile's slots of a digit go
};

// Each warp walks its part of the tile in order: f(element, digit, lanes with the same digit).
template <class F>
__device__ __forceinline__ void walk_part(const IndexPassParams& p, const F& f) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * IndexConfig::kTile + warp * IndexConfig::kWarpSlots;
  for (int round = 0; round < IndexConfig::kRounds; ++round) {
    const int64_t at = first + round * kWarpSize + lane;
    const int digit = at < p.count ? p.digit(p.keys[at]) : -1;
    f(at, digit, __match_any_sync(kAllLanes, digit));
  }
}

static __global__ void __launch_bounds__(IndexConfig::kThreads) index_scatter_kernel(IndexPassParams p) {
  RESONA_SHARED(IndexScatterStorage, storage);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, digits = 1 << p.bits;
  uint16_t* own = storage.warp_counts[warp];
  for (int d = lane; d < digits; d += kWarpSize) own[d] = 0;
  __syncwarp();
  ptx::griddepcontrol_wait();
  walk_part(p, [&](int64_t, int digit, unsigned peers) {
    if (digit >= 0 && lane == __ffs(peers) - 1) own[digit] += __popc(peers);
    __syncwarp();
  });
  __syncthreads();
  for (int d = threadIdx.x; d < digits; d += IndexConfig::kThreads) {
    uint16_t before = 0;
    for (int w = 0; w < IndexConfig::kWarps; ++w) {
      const uint16_t count = storage.warp_counts[w][d];
      storage.warp_counts[w][d] = before;
      before += count;
    }
    storage.begin[d] = scanned(p.counts, p.totals, d * p.tiles + blockIdx.x);
  }
  __syncthreads();
  walk_part(p, [&](int64_t at, int digit, unsigned peers) {
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (digit >= 0) {
      const uint32_t to = storage.begin[digit] + own[digit] + rank;
      p.sorted_keys[to] = p.keys[at];
      p.sorted_slots[to] = p.slots ? p.slots[at] : static_cast<uint32_t>(at);
    }
    __syncwarp();  // ranks are taken before the count moves on
    if (digit >= 0 && rank == 0) own[digit] += __popc(peers);
    __syncwarp();
  });
  ptx::griddepcontrol_launch_dependents();
}

// ---- results

struct IndexResultParams {
  const uint32_t* keys;            // [count], sorted
  const uint32_t* slots;           // [count]
  uint32_t* list;                  // [count]: query row b T + t of each position
  int32_t* position;               // [count]: by slot; -1 where the slot is unused
  uint32_t* offsets;               // [unused_key + 1]: where the list of a key begins
  uint32_t* tile_begin;            // [unused_key + 1]: number of row tiles of a key; scanned afterwards
  int64_t count, slots_per_query;  // B T R k, R k
  int64_t unused_key;
  int64_t rows_per_query,
      tile_rows;  // rows of a list per query (heads that share a selection); rows of a tile
};

static __global__ void __launch_bounds__(IndexConfig::kThreads) index_lists_kernel(IndexResultParams p) {
  ptx::griddepcontrol_wait();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < p.count; at += step) {
    const uint32_t slot = p.slots[at];
    p.list[at] = static_cast<uint32_t>(slot / p.slots_per_query);
    p.position[slot] = p.keys[at] < p.unused_key ? static_cast<int32_t>(at) : -1;
  }
  ptx::griddepcontrol_launch_dependents();
}

__device__ __forceinline__ int64_t first_at_least(const uint32_t* keys, int64_t count, int64_t key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] >= key)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

static __global__ void __launch_bounds__(IndexConfig::kThreads) index_offsets_kernel(IndexResultParams p) {
  ptx::griddepcontrol_wait();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t key = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; key <= p.unused_key;
       key += step) {
    const int64_t begin = first_at_least(p.keys, p.count, key);
    const int64_t end = key < p.unused_key ? first_at_least(p.keys, p.count, key + 1) : begin;
    const int64_t rows = (end - begin) * p.rows_per_query;
    p.offsets[key] = static_cast<uint32_t>(begin);
    p.tile_begin[key] = static_cast<uint32_t>((rows + p.tile_rows - 1) / p.tile_rows);
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
