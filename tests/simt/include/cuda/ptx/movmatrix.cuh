// Host twin of csrc/cuda/ptx/movmatrix.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline uint32_t movmatrix_trans(uint32_t x, simt::Site site = simt::Site::here()) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, row = 2 * (lane % 4), column = lane / 4;
  const uint32_t even = __shfl_sync(kAllLanes, x, 4 * row + column / 2, kWarpSize, site);
  const uint32_t odd = __shfl_sync(kAllLanes, x, 4 * (row + 1) + column / 2, kWarpSize, site);
  const int shift = 16 * (column % 2);
  return (even >> shift & 0xffffu) | (odd >> shift & 0xffffu) << 16;
}

}  // namespace resona::cuda::ptx
