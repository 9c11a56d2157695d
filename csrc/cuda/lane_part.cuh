// A row in the registers of a group of lanes, 1, 2, 4 ... 32 of them as chosen at run time; longer rows come
// in slices.
#pragma once

#include "cuda/device.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

constexpr int kLaneElements = 8;  // of a row, in a lane

// What a lane owns of a slice of a row: packs of 16 bytes, those of neighbouring lanes side by side.
template <class T>
struct LanePart {
  static constexpr int kPack = Pack<T, true>::kSize;
  static constexpr int kPacks = kLaneElements / kPack;
  static constexpr int kUnroll = 4 / kPacks;  // rows in flight: 64 bytes per lane
  Pack<T, true> packs[kPacks];

  static __device__ __forceinline__ int first_element(int pack, int lanes) {
    return (pack * lanes + (static_cast<int>(threadIdx.x) & (lanes - 1))) * kPack;
  }

  // f(pack, its first element within the slice), as far as `count` elements reach.
  template <class F>
  __device__ __forceinline__ void for_packs(int lanes, int count, const F& f) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int e = first_element(i, lanes);
      if (e < count) f(packs[i], e);
    }
  }

  __device__ __forceinline__ void load(const T* from, int lanes, int count, bool vector) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i].clear();
    for_packs(lanes, count, [&](Pack<T, true>& pack, int e) {
      if (vector) return pack.load(from + e);
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (e + j < count) pack.at[j] = from[e + j];
    });
  }

  __device__ __forceinline__ void store(T* to, int lanes, int count, bool vector) {
    for_packs(lanes, count, [&](Pack<T, true>& pack, int e) {
      if (vector) return pack.store(to + e);
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (e + j < count) to[e + j] = pack.at[j];
    });
  }

  __device__ __forceinline__ float at(int i) const { return to_float(packs[i / kPack].at[i % kPack]); }
  __device__ __forceinline__ void set(int i, float x) { from_float(x, packs[i / kPack].at[i % kPack]); }
};

template <class A>
__device__ __forceinline__ A sum_lanes(A x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

}  // namespace resona::cuda
