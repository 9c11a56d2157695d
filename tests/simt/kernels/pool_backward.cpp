// The CUDA side of the gradient of `pool_chunks`: pool_backward.cu itself. "pool_backward" runs the instance
// that a test names, "stage_pool_backward" the one that the plan does.
#include "cuda/pool_backward.cu"

#include "kernels/pool_arguments.h"

namespace {

using namespace resona;

void run_pool_backward(const simt::Arguments& a) {
  const Shape s = pools::shape_of(a);
  const PoolBackwardProblem p{s,
                              nullptr,
                              stages::packed_of(a),
                              pools::context_of(a),
                              pools::rows_of(a, "chunk_gradient", s.context / s.chunk_size),
                              pools::rows_to_write(a, "context_gradient", s.context)};
  cuda::pool_chunks_backward(p, pools::plan_of(a), pools::workspace_of(a), {});
}

void run_stage(const simt::Arguments& a) {
  const Shape s = stages::shape_of(a);
  const PoolBackwardProblem p{s,
                              nullptr,
                              stages::packed_of(a),
                              stages::rows_of(a, "context", s.context),
                              stages::rows_of(a, "chunk_gradient", s.context / s.chunk_size),
                              stages::rows_to_write(a, "context_gradient", s.context)};
  const int64_t dim = s.retrieval_dim;
  const bool vector = rows_of_16_bytes(p.context, dim) && rows_of_16_bytes(p.chunk_gradient, dim) &&
                      rows_of_16_bytes(p.context_gradient, dim);
  const CudaPoolPlan plan = plan_pool_backward_cuda(s, cuda_facts(vector, p.packed), stages::kDevice);
  cuda::pool_chunks_backward(p, plan, stages::workspace_of(a, plan.workspace_bytes), {});
}

const simt::Registration registrations[] = {{"pool_backward", run_pool_backward},
                                            {"stage_pool_backward", run_stage}};

}  // namespace
