// Prefix linear attention on CUDA. As all stages of launch.h: on the caller's stream, in the caller's
// workspace, never waiting for the device.
#pragma once

#include "common/plan_prefix_cuda.h"
#include "common/prefix_problem.h"
#include "cuda/launch.h"

namespace resona::cuda {

void prefix_linear_attention(const PrefixProblem&, const CudaPrefixPlan&, void* workspace, Stream);

// Writes every element of the gradients.
void prefix_linear_attention_backward(const PrefixBackwardProblem&, const CudaPrefixPlan&, void* workspace,
                                      Stream);

void prefix_linear_attention_step(const PrefixStepProblem&, Stream);

}  // namespace resona::cuda
