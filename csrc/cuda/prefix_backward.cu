#include "cuda/prefix_backward.cuh"

#include "cuda/element.cuh"
#include "cuda/prefix.h"
#include "cuda/prefix_launch.cuh"

namespace resona::cuda {
namespace {

constexpr int64_t kGatherBlocks = 1024;

template <class T>
HeadRows<T> from_entry(HeadRows<T> rows, int64_t entry) {
  rows.data += entry * rows.batch_stride;
  return rows;
}

template <class T>
PrefixBackwardParams<T> params_of(const PrefixBackwardProblem& p, const CudaPrefixPlan& plan, int64_t first,
                                  const PrefixArrays& arrays) {
  PrefixBackwardParams<T> a{};
  a.forward = prefix_params<T>(p.forward, plan, first, arrays.slots);
  const HeadRows<T> out = a.forward.out;
  a.out = {out.data, out.batch_stride, out.token_stride, out.head_stride};
  a.out_gradient = head_rows<T>(p.out_gradient);
  a.gradient = {static_cast<const float*>(p.state_gradient),
                static_cast<const float*>(p.normalizer_gradient)};
  a.query_gradient = head_rows_to_write<T>(p.query_gradient);
  a.key_gradient = head_rows_to_write<T>(p.key_gradient);
  a.value_gradient = head_rows_to_write<T>(p.value_gradient);
  a.prefix_key_gradient = head_rows_to_write<T>(p.prefix_key_gradient);
  a.prefix_value_gradient = head_rows_to_write<T>(p.prefix_value_gradient);
  a.initial_state = static_cast<float*>(p.initial_state_gradient);
  a.initial_normalizer = static_cast<float*>(p.initial_normalizer_gradient);
  a.inverse = arrays.inverse, a.denominator_gradient = arrays.denominator_gradient;
  a.query_partials = arrays.query_partials, a.key_partials = arrays.key_partials;
  a.prefix_partials = arrays.prefix_partials;
  a.part = std::min(plan.batch, p.forward.shape.batch - first);
  return a;
}

template <class T>
void gather(const PrefixBackwardParams<T>& p, const CudaPrefixPlan& plan, const float* partials,
            const HeadRows<T>& to, int64_t tokens, Stream stream) {
  if (partials == nullptr) return;
  const PrefixLayout& l = plan.layout;
  const PrefixGatherParams<T> params{
      partials, from_entry(to, p.forward.first_sequence), p.part, tokens, p.forward.heads, l.feature_dim,
      l.slices};
  const int64_t size = saturated_product({p.part, tokens, p.forward.heads, l.feature_dim});
  const int64_t blocks = std::min(kGatherBlocks, (size + kPrefixThreads - 1) / kPrefixThreads);
  launch({"prefix_gather_kernel", {blocks}, static_cast<int>(kPrefixThreads), 0, true, plan.reason}, stream,
         prefix_gather_kernel<T>, params);
}

template <class T>
void run_part(const PrefixBackwardProblem& p, const CudaPrefixPlan& plan,
              const PrefixBackwardParams<T>& params, int64_t lanes, Stream stream) {
  PrefixLauncher start{plan, lanes, stream, params.forward.first_sequence == 0};
  start_pieces(start, params.forward);
  start("prefix_query_gradient_kernel", plan.token_pieces, prefix_query_gradient_kernel<T>, params);
  if (plan.is_cut()) {
    start("prefix_gradient_sums_kernel", plan.token_pieces - 1, prefix_gradient_sums_kernel<T>, params);
    start.scan(params.forward, params.gradient, true);
  }
  start("prefix_key_gradient_kernel", plan.token_pieces, prefix_key_gradient_kernel<T>, params);
  if (plan.is_cut())
    start("prefix_rows_gradient_kernel", plan.prefix_pieces, prefix_rows_gradient_kernel<T>, params);
  const PrefixShape& s = p.forward.shape;
  gather(params, plan, params.query_partials, params.query_gradient, s.tokens, stream);
  gather(params, plan, params.key_partials, params.key_gradient, s.tokens, stream);
  gather(params, plan, params.prefix_partials, params.prefix_key_gradient, s.prefix_rows, stream);
}

}  // namespace

void prefix_linear_attention_backward(const PrefixBackwardProblem& p, const CudaPrefixPlan& plan,
                                      void* memory, Stream stream) {
  with_element(p.forward.query.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_part(p.forward, plan, [&](int64_t first, int64_t sequences) {
      Workspace workspace(memory);
      const PrefixArrays arrays = take_prefix_backward(plan, p.forward.shape, workspace);
      run_part(p, plan, params_of<T>(p, plan, first, arrays), sequences * p.forward.shape.heads, stream);
    });
  });
}

}  // namespace resona::cuda
