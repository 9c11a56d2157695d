// The canonical sum of common/canonical.h by one lane: all eight partial sums in its registers, so that 32
// products of 32 pairs of rows are under way in a warp.
#pragma once

#include "common/canonical.h"
#include "cuda/device.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

// Sixteen-byte loads want rows that are multiples of 16 bytes and aligned so.
template <bool kVector, class T>
__device__ __forceinline__ double canonical_product(const T* a, const T* b, int dim) {
  using Packs = Pack<T, kVector>;
  constexpr int kSize = Packs::kSize, kPacks = canonical::kLanes / kSize;
  double partial[canonical::kLanes] = {};
  int e = 0;
#pragma unroll(kVector ? 8 / sizeof(T) : 1)
  for (; e + canonical::kLanes <= dim; e += canonical::kLanes) {
    Packs x[kPacks], y[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if constexpr (kVector) {
        x[i].words = ptx::ld_global_v4(a + e + i * kSize);
        y[i].words = ptx::ld_global_v4(b + e + i * kSize);
      } else {
        x[i].load(a + e + i), y[i].load(b + e + i);
      }
    }
#pragma unroll
    for (int j = 0; j < canonical::kLanes; ++j)
      partial[j] += static_cast<double>(to_float(x[j / kSize].at[j % kSize])) *
                    static_cast<double>(to_float(y[j / kSize].at[j % kSize]));
  }
#pragma unroll
  for (int j = 0; j < canonical::kLanes; ++j)
    if (e + j < dim)
      partial[j] += static_cast<double>(to_float(a[e + j])) * static_cast<double>(to_float(b[e + j]));
  return canonical::fold(partial);
}

template <class T>
__device__ __forceinline__ double canonical_product(const T* a, const T* b, int64_t dim, bool vector) {
  const int count = static_cast<int>(dim);
  return vector ? canonical_product<true>(a, b, count) : canonical_product<false>(a, b, count);
}

}  // namespace resona::cuda
