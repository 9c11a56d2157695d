#include "cuda/retrieve_backward.cuh"

#include <algorithm>
#include <stdexcept>

#include "cuda/build_index.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed.cuh"

namespace resona::cuda {
namespace {

static_assert(RetrieveBackwardConfig::kThreads == kRetrieveBackwardThreads &&
                  RetrieveBackwardConfig::kPerLane == kElementsPerLane,
              "plans count with these");

// Batch entries `first`, ... of the problem, as many as the shape says.
template <class T>
RetrieveBackwardParams<T> params_of(const RetrieveBackwardProblem& p, const Shape& part, int64_t first,
                                    const CudaRetrieveBackwardPlan& plan) {
  const Shape& s = part;
  const int64_t row = first * s.queries * s.retrieval_heads, chunks = s.context / s.chunk_size;
  RetrieveBackwardParams<T> r{};
  r.query = static_cast<const T*>(p.query.data) + first * p.query.batch_stride;
  r.query_batch_stride = p.query.batch_stride;
  r.query_token_stride = p.query.token_stride;
  r.query_head_stride = p.query.head_stride;
  r.chunks = static_cast<const T*>(p.chunks.data) + first * p.chunks.batch_stride;
  r.chunk_batch_stride = p.chunks.batch_stride;
  r.chunk_row_stride = p.chunks.token_stride;
  r.chunk_head_stride = p.chunks.head_stride;
  r.indices = p.indices + row * s.top_k;
  r.score_gradient = static_cast<const float*>(p.score_gradient) + row * s.top_k;
  r.query_gradient = static_cast<T*>(p.query_gradient.data) + row * s.retrieval_dim;
  r.chunk_gradient =
      static_cast<T*>(p.chunk_gradient.data) + first * chunks * s.retrieval_heads * s.retrieval_dim;
  r.batch = s.batch, r.queries = s.queries, r.heads = s.retrieval_heads, r.top_k = s.top_k;
  r.context = s.context, r.chunk_size = s.chunk_size, r.dim = s.retrieval_dim;
  r.chunks_per_batch = chunks;
  r.lanes = static_cast<int>(plan.lanes);
  r.vector = plan.vector;
  r.segment = plan.segment;
  return r;
}

template <class T>
void run_part(const RetrieveBackwardProblem& p, const Shape& part, int64_t first,
              const CudaRetrieveBackwardPlan& plan, void* memory, Stream stream) {
  Workspace workspace(memory);
  const RetrieveBackwardArrays arrays = take_retrieve_backward(plan, part, workspace);
  RetrieveBackwardParams<T> params = params_of<T>(p, part, first, plan);
  params.packed = find_chunks(p.packed, part, arrays.chunk_begin, stream);
  params.factors = arrays.factors, params.partials = arrays.partials;
  const auto start = [&](const char* name, int64_t blocks, void (*kernel)(RetrieveBackwardParams<T>)) {
    launch({name, {blocks}, RetrieveBackwardConfig::kThreads, 0, true, plan.reason}, stream, kernel, params);
  };
  start("retrieve_query_gradient_kernel", plan.query_blocks, retrieve_query_gradient_kernel<T>);
  const IndexProblem index{part, params.indices, params.packed, 1, plan.segment, 0, 0, false};
  const bool is_last = first + plan.batch >= p.shape.batch;
  const IndexArrays lists = build_index(index, is_last ? plan.last_index : plan.index, workspace, stream);
  params.slots = lists.sorted_slots, params.offsets = lists.offsets;
  params.tile_begin = lists.tile_begin, params.tile_totals = lists.tile_totals;
  start("retrieve_chunk_segments_kernel", plan.segment_blocks, retrieve_chunk_segments_kernel<T>);
  start("retrieve_chunk_gradient_kernel", plan.chunk_blocks, retrieve_chunk_gradient_kernel<T>);
}

}  // namespace

void retrieve_backward(const RetrieveBackwardProblem& p, const CudaRetrieveBackwardPlan& plan, void* memory,
                       Stream stream) {
  if (retrieve_segment(p.shape.queries) != plan.segment ||
      retrieve_partials(plan.index.slots, plan.segment) != plan.partial_rows)
    throw std::logic_error("resona::cuda: retrieve_backward: the plan and the kernels disagree on segments");
  with_element(p.query.dtype, [&](auto element) {
    for (int64_t first = 0; first < p.shape.batch; first += plan.batch) {
      Shape part = p.shape;
      part.batch = std::min(plan.batch, p.shape.batch - first);
      run_part<decltype(element)>(p, part, first, plan, memory, stream);
    }
  });
}

}  // namespace resona::cuda
