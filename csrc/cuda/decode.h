// A decode step as the operator sees it.
#pragma once

#include "common/decode_problem.h"
#include "common/plan_decode_cuda.h"
#include "cuda/launch.h"

namespace resona::cuda {

void decode_step(const DecodeProblem&, const CudaDecodePlan&, void* workspace, Stream);

}  // namespace resona::cuda
