// The CUDA side of `pool_chunks`: pool.cu itself, on arrays from Python. "pool" runs the instance that a test
// names, "stage_pool" the one that the plan does.
#include "cuda/pool.cu"

#include "kernels/pool_arguments.h"

namespace {

using namespace resona;

void run_pool(const simt::Arguments& a) {
  const Shape s = pools::shape_of(a);
  const PoolProblem p{s, nullptr, stages::packed_of(a), pools::context_of(a),
                      pools::rows_to_write(a, "chunks", s.context / s.chunk_size)};
  cuda::pool_chunks(p, pools::plan_of(a), pools::workspace_of(a), {});
}

void run_stage(const simt::Arguments& a) {
  const Shape s = stages::shape_of(a);
  const PoolProblem p{s, nullptr, stages::packed_of(a), stages::rows_of(a, "context", s.context),
                      stages::rows_to_write(a, "chunks", s.context / s.chunk_size)};
  const bool vector =
      rows_of_16_bytes(p.context, s.retrieval_dim) && rows_of_16_bytes(p.chunks, s.retrieval_dim);
  const CudaPoolPlan plan = plan_pool_cuda(s, cuda_facts(vector, p.packed), stages::kDevice);
  cuda::pool_chunks(p, plan, stages::workspace_of(a, plan.workspace_bytes), {});
}

const simt::Registration registrations[] = {{"pool", run_pool}, {"stage_pool", run_stage}};

}  // namespace
