#include <stdexcept>

#include "ops/backend.h"

#if defined(RESONA_HAS_CUDA)
#include "cuda/attend.h"
#include "cuda/attend_backward.h"
#include "cuda/decode.h"
#include "cuda/fused.h"
#include "cuda/prefix.h"
#include "cuda/two_level.h"
#include "ops/cuda.h"

namespace resona::ops {
namespace {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const Tensor& like) : call_(like) {}

  bool writes_all() const override { return true; }

  void pool_chunks(const PoolProblem& p) const override {
    const int64_t dim = p.shape.retrieval_dim;
    const bool vector_rows = rows_of_16_bytes(p.context, dim) && rows_of_16_bytes(p.chunks, dim);
    run(&cuda::pool_chunks, p, plan_pool_cuda(p.shape, cuda_facts(vector_rows, p.packed), call_.device()));
  }
  void pool_chunks_backward(const PoolBackwardProblem& p) const override {
    const int64_t dim = p.shape.retrieval_dim;
    const bool vector_rows = rows_of_16_bytes(p.context, dim) && rows_of_16_bytes(p.chunk_gradient, dim) &&
                             rows_of_16_bytes(p.context_gradient, dim);
    run(&cuda::pool_chunks_backward, p,
        plan_pool_backward_cuda(p.shape, cuda_facts(vector_rows, p.packed), call_.device()));
  }
  void retrieve(const RetrieveProblem& p) const override {
    const CudaSearchFacts facts{p.query.dtype, p.unit_chunks, cuda_facts(false, p.packed).sequences};
    run(&cuda::retrieve, p, plan_search_cuda(p.shape, facts, call_.device()));
  }
  void retrieve_two_level(const TwoLevelProblem& p) const override {
    const bool vector_rows = rows_of_16_bytes(p.retrieve.chunks, p.retrieve.shape.retrieval_dim);
    run(&cuda::retrieve_two_level, p,
        plan_two_level_cuda(p, cuda_facts(vector_rows, p.retrieve.packed), call_.device()));
  }
  void retrieve_backward(const RetrieveBackwardProblem& p) const override {
    const int64_t dim = p.shape.retrieval_dim;
    const bool vector_rows = rows_of_16_bytes(p.query, dim) && rows_of_16_bytes(p.chunks, dim) &&
                             rows_of_16_bytes(p.query_gradient, dim) &&
                             rows_of_16_bytes(p.chunk_gradient, dim);
    run(&cuda::retrieve_backward, p,
        plan_retrieve_backward_cuda(p.shape, cuda_facts(vector_rows, p.packed), call_.device()));
  }
  void attend(const AttendProblem& p) const override {
    run(&cuda::attend, p, plan_attend_cuda(p.shape, facts_of(p), call_.device()));
  }
  void retrieve_attend(const FusedProblem& p) const override {
    const Rows& context = p.pool.context;
    const bool vector_context = rows_of_16_bytes(context, p.pool.shape.retrieval_dim);
    run(&cuda::retrieve_attend, p,
        plan_fused_cuda(p.pool.shape, {context.dtype, vector_context, facts_of(p.attend)}, call_.device()));
  }
  void attend_backward(const AttendBackwardProblem& p) const override {
    const AttendProblem& f = p.forward;
    const auto vector = [&](const auto&... rows) {
      return (rows_of_16_bytes(rows, f.shape.head_dim) && ...);
    };
    const bool vector_rows = vector(f.query, f.key, f.value, f.out, p.out_gradient, p.query_gradient,
                                    p.key_gradient, p.value_gradient);
    run(&cuda::attend_backward, p,
        plan_attend_backward_cuda(f.shape, f.query.dtype, cuda_facts(vector_rows, f.packed),
                                  f.bias != nullptr, f.sink != nullptr, call_.device()));
  }
  void decode_step(const DecodeProblem& p) const override {
    const auto vector = [](int64_t dim, const auto&... rows) { return (rows_of_16_bytes(rows, dim) && ...); };
    const CudaDecodeFacts facts{
        p.query.dtype,
        p.query_embedding.dtype,
        vector(p.shape.head_dim, p.query, p.key, p.value, p.key_cache, p.value_cache, p.out),
        vector(p.shape.retrieval_dim, p.chunks) &&
            (!p.two_level() || vector(p.shape.retrieval_dim, p.superchunks)),
        p.superchunk_size,
        p.probes};
    run(&cuda::decode_step, p, plan_decode_cuda(p.shape, facts, call_.device()));
  }
  void prefix_linear_attention(const PrefixProblem& p) const override {
    run(&cuda::prefix_linear_attention, p, plan_prefix_cuda(p.shape, facts_of(p), call_.device()));
  }
  void prefix_linear_attention_backward(const PrefixBackwardProblem& p) const override {
    CudaPrefixFacts facts = facts_of(p.forward);
    facts.vector_rows = facts.vector_rows && rows_of_16_bytes(p.out_gradient, p.forward.shape.value_dim);
    run(&cuda::prefix_linear_attention_backward, p,
        plan_prefix_backward_cuda(p.forward.shape, facts, call_.device()));
  }
  void prefix_linear_attention_step(const PrefixStepProblem& p) const override {
    cuda::prefix_linear_attention_step(p, call_.stream());
  }

 private:
  static CudaAttendFacts facts_of(const AttendProblem& p) {
    const int64_t dim = p.shape.head_dim;
    const bool vector_rows = rows_of_16_bytes(p.query, dim) && rows_of_16_bytes(p.key, dim) &&
                             rows_of_16_bytes(p.value, dim) && rows_of_16_bytes(p.out, dim);
    return {cuda_facts(vector_rows, p.packed), p.query.dtype, p.distinct, p.bias != nullptr};
  }

  static CudaPrefixFacts facts_of(const PrefixProblem& p) {
    const auto vector = [](int64_t dim, const auto&... rows) { return (rows_of_16_bytes(rows, dim) && ...); };
    return {p.packed.cu_seqlens != nullptr, vector(p.shape.feature_dim, p.query, p.key, p.prefix_key) &&
                                                vector(p.shape.value_dim, p.value, p.prefix_value)};
  }

  template <class Problem, class Plan>
  void run(void (*stage)(const Problem&, const Plan&, void*, cuda::Stream), const Problem& p,
           const Plan& plan) const {
    const Tensor memory = call_.workspace(plan.workspace_bytes);
    stage(p, plan, memory.mutable_data_ptr(), call_.stream());
  }

  CudaCall call_;
};

}  // namespace

bool has_cuda() { return true; }

bool is_capturing(const Tensor& t) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());  // a null stream is the device's
  return cuda::is_capturing(current_stream(t));
}

std::unique_ptr<Backend> make_cuda_backend(const Tensor& like) { return std::make_unique<CudaBackend>(like); }

}  // namespace resona::ops

#else

namespace resona::ops {

bool has_cuda() { return false; }

// Checks refuse CUDA tensors before the following is asked.

bool is_capturing(const Tensor&) { return false; }

std::unique_ptr<Backend> make_cuda_backend(const Tensor&) {
  throw std::logic_error("resona: this build has no CUDA kernels");
}

}  // namespace resona::ops
#endif
