// The CUDA side of the gradient of `pool_chunks`, from the problem on: pool_backward.cu itself.
#include "cuda/pool_backward.cu"

#include "kernels/stage_arguments.h"

namespace {

void run_stage(const simt::Arguments& a) {
  using namespace resona;
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

const simt::Registration registration("stage_pool_backward", run_stage);

}  // namespace
