// Score and chunk as one number. A key orders like (score descending, chunk ascending), NaN below every
// number: its upper half is the score's bits made monotone, its lower half the chunk's complement. No key is
// 0, so 0 stands for none.
#pragma once

#include "cuda/bag.cuh"
#include "cuda/device.cuh"

namespace resona::cuda {

__device__ __forceinline__ uint64_t search_key(float score, int chunk) {
  const uint32_t bits = __float_as_uint(score);
  const uint32_t ordered = score != score ? 1 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(chunk);
}

__device__ __forceinline__ float score_of_key(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  if (ordered == 1) return kNoScore;
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ int chunk_of_key(uint64_t key) {
  return static_cast<int>(~static_cast<uint32_t>(key));
}

__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, key, distance);
    key = other > key ? other : key;
  }
  return key;
}

// Of keys first, first + step, ... of `count`; 0 if there is none.
template <class Index>
__device__ __forceinline__ uint64_t largest_below(const uint64_t* keys, Index count, int first, int step,
                                                  uint64_t bound) {
  uint64_t largest = 0;
  for (Index i = first; i < count; i += step)
    if (keys[i] < bound && keys[i] > largest) largest = keys[i];
  return largest;
}

constexpr uint64_t kAboveEveryKey = ~uint64_t{0};

}  // namespace resona::cuda
