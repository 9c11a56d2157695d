// The CUDA side of the gradients of prefix linear attention, from the problem on: prefix_backward.cu itself.
#include "cuda/prefix_backward.cu"

#include "kernels/prefix_arguments.h"

namespace {

using namespace prefix;

PrefixBackwardProblem gradients_of(const simt::Arguments& a) {
  PrefixBackwardProblem p{};
  p.forward = problem_of(a);
  p.out_gradient = input(a, "out_gradient");
  p.state_gradient = a.optional_array<float>("state_gradient");
  p.normalizer_gradient = a.optional_array<float>("normalizer_gradient");
  p.query_gradient = rows_of(a, "query_gradient"), p.key_gradient = rows_of(a, "key_gradient");
  p.value_gradient = rows_of(a, "value_gradient");
  p.prefix_key_gradient = rows_of(a, "prefix_key_gradient");
  p.prefix_value_gradient = rows_of(a, "prefix_value_gradient");
  p.initial_state_gradient = a.optional_array<float>("initial_state_gradient");
  p.initial_normalizer_gradient = a.optional_array<float>("initial_normalizer_gradient");
  return p;
}

CudaPrefixPlan plan_of(const simt::Arguments& a, const PrefixBackwardProblem& p) {
  CudaPrefixFacts facts = facts_of(p.forward);
  facts.vector_rows = facts.vector_rows && rows_of_16_bytes(p.out_gradient, p.forward.shape.value_dim);
  CudaPrefixPlan plan = plan_prefix_backward_cuda(p.forward.shape, facts, device_of(a));
  change(plan, a, p.forward.shape, take_prefix_backward);
  return plan;
}

void run_plan(const simt::Arguments& a) { report(a, plan_of(a, gradients_of(a))); }

void run(const simt::Arguments& a) {
  const PrefixBackwardProblem p = gradients_of(a);
  cuda::prefix_linear_attention_backward(p, plan_of(a, p), a.optional_array<uint8_t>("workspace"), {});
}

const simt::Registration registrations[] = {{"stage_prefix_backward", run},
                                            {"stage_prefix_backward_plan", run_plan}};

}  // namespace
