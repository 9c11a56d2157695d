// The CUDA side of prefix linear attention, from the problem on: the plan and prefix.cu themselves, on arrays
// from Python.
#include "cuda/prefix.cu"

#include "common/plan_prefix_cuda.cpp"

#include "kernels/prefix_arguments.h"

namespace {

using namespace prefix;

CudaPrefixPlan plan_of(const simt::Arguments& a, const PrefixProblem& p) {
  CudaPrefixPlan plan = plan_prefix_cuda(p.shape, facts_of(p), device_of(a));
  change(plan, a, p.shape, take_prefix);
  return plan;
}

void run_plan(const simt::Arguments& a) { report(a, plan_of(a, problem_of(a))); }

void run(const simt::Arguments& a) {
  const PrefixProblem p = problem_of(a);
  cuda::prefix_linear_attention(p, plan_of(a, p), a.optional_array<uint8_t>("workspace"), {});
}

void run_step(const simt::Arguments& a) {
  PrefixStepProblem p{};
  p.shape = shape_of(a);
  p.query = input(a, "query"), p.key = input(a, "key"), p.value = input(a, "value");
  p.mask = a.optional_array<uint8_t>("mask");
  p.scale = scale_of(a);
  p.out = rows_of(a, "out");
  p.state = a.array<float>("state"), p.normalizer = a.array<float>("normalizer");
  cuda::prefix_linear_attention_step(p, {});
}

const simt::Registration registrations[] = {
    {"stage_prefix", run}, {"stage_prefix_plan", run_plan}, {"stage_prefix_step", run_step}};

}  // namespace
