// Exclusive sums. Inside a block by shuffles; over a long array in two kernels:
//
//   scan_tiles_kernel    each block: sums of its 2048 entries in place, and their total
//   scan_totals_kernel   one block: sums of the totals in place
//
// after which the sum before entry i is entries[i] + totals[i / 2048], which readers add up themselves
// (scanned()): a third pass would only write what they can compute. Bytes: 8 per entry. No block waits.
#pragma once

#include "cuda/device.cuh"
#include "cuda/ptx/griddepcontrol.cuh"

namespace resona::cuda {

template <class T>
struct BlockSums {
  T before, total;
};

// For all threads of a block of kWarps warps. `totals` is shared memory of its own.
template <int kWarps, class T>
__device__ __forceinline__ BlockSums<T> block_scan(T value, T (&totals)[kWarps]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T sum = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T left = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += left;
  }
  if (lane == kWarpSize - 1) totals[warp] = sum;
  __syncthreads();
  BlockSums<T> sums{sum - value, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) sums.before += totals[w];
    sums.total += totals[w];
  }
  __syncthreads();  // the totals are read before the next scan replaces them
  return sums;
}

struct ScanConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kPerThread = 8;
  static constexpr int kTile = kThreads * kPerThread;
  static constexpr int kRegisterCap = 40;
};

struct ScanParams {
  uint32_t* entries;  // [count]
  uint32_t* totals;   // [ceil(count / kTile)]
  int64_t count;
};

struct ScanStorage {
  uint32_t totals[ScanConfig::kWarps];
};

// The sum of the entries before `i`, once both kernels have run.
__device__ __forceinline__ uint32_t scanned(const uint32_t* entries, const uint32_t* totals, int64_t i) {
  return entries[i] + totals[i / ScanConfig::kTile];
}

static __global__ void __launch_bounds__(ScanConfig::kThreads) scan_tiles_kernel(ScanParams p) {
  RESONA_SHARED(ScanStorage, storage);
  ptx::griddepcontrol_wait();
  const int64_t tile = blockIdx.x;
  const int64_t first = tile * ScanConfig::kTile + static_cast<int64_t>(threadIdx.x) * ScanConfig::kPerThread;
  uint32_t values[ScanConfig::kPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < ScanConfig::kPerThread; ++i) {
    values[i] = first + i < p.count ? p.entries[first + i] : 0;
    sum += values[i];
  }
  const BlockSums<uint32_t> sums = block_scan(sum, storage.totals);
  uint32_t before = sums.before;
#pragma unroll
  for (int i = 0; i < ScanConfig::kPerThread; ++i) {
    if (first + i < p.count) p.entries[first + i] = before;
    before += values[i];
  }
  if (threadIdx.x == 0) p.totals[tile] = sums.total;
  ptx::griddepcontrol_launch_dependents();
}

static __global__ void __launch_bounds__(ScanConfig::kThreads) scan_totals_kernel(ScanParams p) {
  RESONA_SHARED(ScanStorage, storage);
  ptx::griddepcontrol_wait();
  const int64_t tiles = (p.count + ScanConfig::kTile - 1) / ScanConfig::kTile;
  uint32_t before = 0;
  for (int64_t first = 0; first < tiles; first += ScanConfig::kThreads) {
    const int64_t tile = first + threadIdx.x;
    const BlockSums<uint32_t> sums = block_scan(tile < tiles ? p.totals[tile] : 0, storage.totals);
    if (tile < tiles) p.totals[tile] = before + sums.before;
    before += sums.total;
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
