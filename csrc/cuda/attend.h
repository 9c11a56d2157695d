// Attention as the operators see it, and its paths.
#pragma once

#include "common/plan_attend_cuda.h"
#include "cuda/launch.h"

namespace resona::cuda {

void attend(const AttendProblem&, const CudaAttendPlan&, void* workspace, Stream);

// One path each; the plan names it.
void attend_query(const AttendProblem&, const CudaAttendPlan&, Workspace&, Stream);
void attend_dense(const AttendProblem&, const CudaAttendPlan&, Workspace&, Stream);
void attend_chunk(const AttendProblem&, const CudaAttendPlan&, Workspace&, Stream);

}  // namespace resona::cuda
