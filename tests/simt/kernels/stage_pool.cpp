// The CUDA side of `pool_chunks`, from the problem on: pool.cu itself, on arrays from Python.
#include "cuda/pool.cu"

#include "kernels/stage_arguments.h"

namespace {

void run_stage(const simt::Arguments& a) {
  using namespace resona;
  const Shape s = stages::shape_of(a);
  const PoolProblem p{s, nullptr, stages::packed_of(a), stages::rows_of(a, "context", s.context),
                      stages::rows_to_write(a, "chunks", s.context / s.chunk_size)};
  const bool vector =
      rows_of_16_bytes(p.context, s.retrieval_dim) && rows_of_16_bytes(p.chunks, s.retrieval_dim);
  const CudaPoolPlan plan = plan_pool_cuda(s, cuda_facts(vector, p.packed), stages::kDevice);
  cuda::pool_chunks(p, plan, stages::workspace_of(a, plan.workspace_bytes), {});
}

const simt::Registration registration("stage_pool", run_stage);

}  // namespace
