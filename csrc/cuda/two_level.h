// The two-level search on CUDA. What launch.h says of stages holds.
#pragma once

#include "common/plan_two_level_cuda.h"
#include "cuda/launch.h"

namespace resona::cuda {

void retrieve_two_level(const TwoLevelProblem&, const CudaTwoLevelPlan&, void* workspace, Stream);

}  // namespace resona::cuda
