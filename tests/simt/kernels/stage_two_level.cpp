// The CUDA side of `retrieve_two_level`, from the problem on: two_level.cu and its plan. The stages are those
// of the runners search and pool.
#include "cuda/two_level.cu"

#include "common/plan.cpp"
#include "common/plan_two_level.cpp"
#include "common/plan_two_level_cuda.cpp"

#include "kernels/stage_arguments.h"

namespace {

using namespace resona;

void run_stage(const simt::Arguments& a) {
  TwoLevelProblem p{};
  RetrieveProblem& r = p.retrieve;
  const Shape s = r.shape = stages::shape_of(a);
  r.packed = stages::packed_of(a);
  r.query = stages::rows_of(a, "query", s.queries);
  r.chunks = stages::rows_of(a, "chunks", s.context / s.chunk_size);
  r.indices = a.array<int32_t>("indices"), r.scores = a.array<float>("scores");
  p.plan = plan_two_level(s, a.integer("superchunk_size"), a.integer("probes"));
  const CudaFacts facts = cuda_facts(rows_of_16_bytes(r.chunks, s.retrieval_dim), r.packed);
  CudaTwoLevelPlan plan = plan_two_level_cuda(p, facts, stages::kDevice);
  if (a.integer("part_queries") > 0) {
    plan.batch = plan.heads = 1;
    if (s.queries > 0 && r.packed.cu_seqlens == nullptr) plan.queries = a.integer("part_queries");
    finish_two_level(plan, p, facts, stages::kDevice);
  }
  cuda::retrieve_two_level(p, plan, stages::workspace_of(a, plan.workspace_bytes), {});
}

const simt::Registration registration("stage_two_level", run_stage);

}  // namespace
