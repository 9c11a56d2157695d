// The tuning that CUDA plans are made with: the defaults, unless a sweep has changed them for this process.
#pragma once

#include <string>

#include "common/cuda_tuning.h"

namespace resona::ops {

CudaTuning cuda_tuning();

// Returns what the field was before.
int64_t tune_cuda(const std::string& name, int64_t value);

}  // namespace resona::ops
