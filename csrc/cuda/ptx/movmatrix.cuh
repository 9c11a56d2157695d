// Transposes an 8x8 matrix of 16-bit elements that lies in the registers of a warp as ldmatrix leaves it:
// before, lane 4 r + c / 2 holds elements c, c + 1 of row r; after, of column r. All 32 lanes take part.
// PTX ISA: "Warp Level Matrix Multiply-Accumulate Instructions: movmatrix".
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace resona::cuda::ptx
