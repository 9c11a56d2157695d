// The CUDA side of the gradient of `retrieve`, from the problem on: retrieve_backward.cu and index.cu
// themselves.
#include "cuda/retrieve_backward.cu"

#include "kernels/stage_arguments.h"

namespace {

// As if the workspace had room for some batch entries only.
void cut(resona::CudaRetrieveBackwardPlan& plan, const resona::Shape& whole, int64_t batch) {
  resona::Shape s = whole;
  plan.batch = s.batch = batch;
  plan.index = plan_index_cuda(s, stages::kDevice);
  s.batch = (whole.batch - 1) % batch + 1;
  plan.last_index = plan_index_cuda(s, stages::kDevice);
  plan.partial_rows = resona::cuda::retrieve_partials(plan.index.slots, plan.segment);
}

void run_stage(const simt::Arguments& a) {
  using namespace resona;
  const Shape s = stages::shape_of(a);
  const int64_t chunks = s.context / s.chunk_size, dim = s.retrieval_dim;
  const RetrieveBackwardProblem p{s,
                                  nullptr,
                                  stages::packed_of(a),
                                  stages::rows_of(a, "query", s.queries),
                                  stages::rows_of(a, "chunks", chunks),
                                  a.array<int32_t>("indices"),
                                  a.array<float>("score_gradient"),
                                  stages::rows_to_write(a, "query_gradient", s.queries),
                                  stages::rows_to_write(a, "chunk_gradient", chunks)};
  const bool vector = rows_of_16_bytes(p.query, dim) && rows_of_16_bytes(p.chunks, dim) &&
                      rows_of_16_bytes(p.query_gradient, dim) && rows_of_16_bytes(p.chunk_gradient, dim);
  CudaRetrieveBackwardPlan plan =
      plan_retrieve_backward_cuda(s, cuda_facts(vector, p.packed), stages::kDevice);
  if (a.integer("batch_part") > 0) cut(plan, s, a.integer("batch_part"));
  cuda::retrieve_backward(p, plan, stages::workspace_of(a, plan.workspace_bytes), {});
}

const simt::Registration registration("stage_retrieve_backward", run_stage);

}  // namespace
