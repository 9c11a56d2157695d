// pool_chunks, retrieve and attend on one stream and in one workspace.
#pragma once

#include "common/plan_fused_cuda.h"
#include "cuda/launch.h"

namespace resona::cuda {

void retrieve_attend(const FusedProblem&, const CudaFusedPlan&, void* workspace, Stream);

}  // namespace resona::cuda
