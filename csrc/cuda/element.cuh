// From a dtype, known when the program runs, to the type that kernels are compiled for.
#pragma once

#include <stdexcept>

#include "common/problem.h"
#include "cuda/types.cuh"

namespace resona::cuda {

// Calls f(T()) for the T that is stored as `dtype`. Checks keep float64 from getting here.
template <class F>
void with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(Half());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat64:
      break;
  }
  throw std::logic_error("resona::cuda: expected float32, float16 or bfloat16, got float64");
}

}  // namespace resona::cuda
