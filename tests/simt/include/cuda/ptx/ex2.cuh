// Host twin of csrc/cuda/ptx/ex2.cuh. Rounded once, where the instruction may be two units off.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline float ex2_approx_ftz_f32(float x) {
  const float flushed = std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x;
  const float y = std::exp2(flushed);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace resona::cuda::ptx
