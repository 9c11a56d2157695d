// 2^x, to about two units in the last place; subnormal operands and results become zero.
// PTX ISA: "Floating Point Instructions: ex2".
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

__device__ __forceinline__ float ex2_approx_ftz_f32(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace resona::cuda::ptx
