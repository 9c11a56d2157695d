// Attention as the operators see it.
#pragma once

#include "common/plan_attend_cuda.h"
#include "cuda/launch.h"

namespace resona::cuda {

void attend(const AttendProblem&, const CudaAttendPlan&, void* workspace, Stream);

}  // namespace resona::cuda
