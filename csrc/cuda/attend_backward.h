// The gradients of `attend` on CUDA. As all stages of launch.h: on the caller's stream, in the caller's
// workspace, never waiting for the device.
#pragma once

#include "common/plan_attend_backward_cuda.h"
#include "common/problem.h"
#include "cuda/launch.h"

namespace resona::cuda {

// Writes every element of the gradients; those of the bias and the sink unless they are null.
void attend_backward(const AttendBackwardProblem&, const CudaAttendBackwardPlan&, void* workspace, Stream);

}  // namespace resona::cuda
