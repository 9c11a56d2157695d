// The canonical sum of common/canonical.h, spread over lanes: lane p of eight neighbours adds the elements
// e = p (mod 8) in ascending order, and the eight partial sums meet at distance 4, 2, 1. Addition commutes,
// so every lane ends with the bits of canonical::fold.
#pragma once

#include "common/canonical.h"
#include "cuda/device.cuh"

namespace resona::cuda {

// Adds the squares of row[0..count) to lane p's partial sum; begin every row, or slice of it, at p.
__device__ __forceinline__ double add_squares(double partial, const float* row, int p, int count) {
#pragma unroll 4
  for (int e = p; e < count; e += canonical::kLanes) {
    const double x = row[e];
    partial += x * x;  // exact product: fused or not, the same sum
  }
  return partial;
}

__device__ __forceinline__ double fold_lanes(double partial) {
#pragma unroll
  for (int distance = canonical::kLanes / 2; distance > 0; distance /= 2)
    partial += __shfl_xor_sync(kAllLanes, partial, distance);
  return partial;
}

}  // namespace resona::cuda
