// The best k of a list of keys, best first, by a block: k times the largest below the last one.
//
// A thread keeps the largest that is left of its own keys, so a round costs one reduction and one barrier,
// and only the thread whose key was taken reads its keys again.
#pragma once

#include "cuda/device.cuh"
#include "cuda/search_key.cuh"

namespace resona::cuda {

template <int kWarps>
struct SelectStorage {
  uint64_t largest[2][kWarps];  // of even and odd rounds: one barrier orders both
};

// Thread 0 calls take(slot, key) for slots 0, 1, ...; returns how many there were to all threads. Keys are
// different, or 0 for none.
template <int kWarps, class Take>
__device__ __forceinline__ int64_t select_best(const uint64_t* keys, int64_t count, int64_t most,
                                               SelectStorage<kWarps>& storage, const Take& take) {
  constexpr int kThreads = kWarps * kWarpSize;
  const int thread = threadIdx.x;
  uint64_t own = largest_below(keys, count, thread, kThreads, kAboveEveryKey);
  for (int64_t slot = 0; slot < most; ++slot) {
    uint64_t* largest = storage.largest[slot % 2];
    const uint64_t of_warp = warp_max(own);
    if (thread % kWarpSize == 0) largest[thread / kWarpSize] = of_warp;
    __syncthreads();
    uint64_t best = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) best = largest[warp] > best ? largest[warp] : best;
    if (best == 0) return slot;
    if (thread == 0) take(slot, best);
    if (own == best) own = largest_below(keys, count, thread, kThreads, best);
  }
  return most;
}

}  // namespace resona::cuda
