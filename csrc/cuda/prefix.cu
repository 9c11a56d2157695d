#include "cuda/prefix.h"

#include "cuda/element.cuh"
#include "cuda/prefix_launch.cuh"
#include "cuda/prefix_step.cuh"

namespace resona::cuda {

void prefix_linear_attention(const PrefixProblem& p, const CudaPrefixPlan& plan, void* memory,
                             Stream stream) {
  with_element(p.query.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_part(p, plan, [&](int64_t first, int64_t sequences) {
      Workspace workspace(memory);
      const PrefixArrays arrays = take_prefix(plan, p.shape, workspace);
      const PrefixParams<T> params = prefix_params<T>(p, plan, first, arrays.slots);
      PrefixLauncher start{plan, sequences * p.shape.heads, stream, first == 0};
      start_pieces(start, params);
      start("prefix_sweep_kernel", plan.token_pieces, prefix_sweep_kernel<T>, params);
    });
  });
}

void prefix_linear_attention_step(const PrefixStepProblem& p, Stream stream) {
  with_element(p.query.dtype, [&](auto element) {
    using T = decltype(element);
    PrefixStepParams<T> a{};
    a.query = head_rows<T>(p.query), a.key = head_rows<T>(p.key), a.value = head_rows<T>(p.value);
    a.mask = p.mask;
    a.out = head_rows_to_write<T>(p.out);
    a.state = static_cast<float*>(p.state), a.normalizer = static_cast<float*>(p.normalizer);
    a.heads = static_cast<int>(p.shape.heads);
    a.feature_dim = static_cast<int>(p.shape.feature_dim), a.value_dim = static_cast<int>(p.shape.value_dim);
    for (a.lanes = 1; a.lanes < a.value_dim;) a.lanes *= 2;
    a.first = static_cast<float>(std::sqrt(p.scale)), a.second = static_cast<float>(p.scale / std::sqrt(2.0));
    launch({"prefix_step_kernel", {p.shape.batch * p.shape.heads}, PrefixStepConfig::kThreads}, stream,
           prefix_step_kernel<T>, a);
  });
}

}  // namespace resona::cuda
