#include "common/plan_two_level_cuda.h"

#include <algorithm>

namespace resona {
namespace {

constexpr int64_t kProbeBytes = 128 << 20;  // of the probes of a part, if it can be that small

int64_t probe_bytes(const TwoLevelProblem& p) {
  const Shape& s = p.retrieve.shape;
  return saturated_product({s.batch, s.queries, s.retrieval_heads, p.plan.probes, 8});
}

CudaSearchPlan plan_probe(const TwoLevelProblem& part, const CudaDevice& device) {
  return plan_search_cuda(probe_shape(part), {part.retrieve.query.dtype, true, CudaFacts::kNotPacked},
                          device);
}

// All at once if their probes fit; else one batch entry and head at a time, and as many of its queries as
// fit.
void divide(CudaTwoLevelPlan& plan, const TwoLevelProblem& p) {
  const Shape& s = p.retrieve.shape;
  plan.batch = s.batch, plan.heads = s.retrieval_heads, plan.queries = std::max<int64_t>(1, s.queries);
  if (probe_bytes(p) <= kProbeBytes) return;
  plan.reason = "one batch entry and head at a time, to bound the probes";
  plan.batch = plan.heads = 1;
  // The queries of packed sequences do not stand at the end of one context, so they stay together.
  if (plan.sequences != CudaFacts::kNotPacked) return;
  plan.queries = std::clamp<int64_t>(kProbeBytes / (8 * p.plan.probes), 1, std::max<int64_t>(1, s.queries));
}

}  // namespace

TwoLevelProblem part_of(TwoLevelProblem p, const CudaTwoLevelPlan& plan, int64_t first, int64_t queries) {
  Shape& s = p.retrieve.shape;
  s.batch = std::min(s.batch, plan.batch), s.retrieval_heads = std::min(s.retrieval_heads, plan.heads);
  s.context -= s.queries - first - queries;  // the last of them stands at its end
  s.queries = queries;
  return p;
}

void finish_two_level(CudaTwoLevelPlan& plan, const TwoLevelProblem& p, const CudaFacts& facts,
                      const CudaDevice& device) {
  const Shape& s = p.retrieve.shape;
  // Planned for the last queries, before which the most superchunks lie.
  const auto last_of = [&](int64_t queries) { return part_of(p, plan, s.queries - queries, queries); };
  const int64_t rest = s.queries - std::max<int64_t>(0, s.queries - 1) / plan.queries * plan.queries;
  const TwoLevelProblem part = last_of(std::min(plan.queries, s.queries)), last = last_of(rest);
  plan.pool = plan_pool_cuda(centroid_shape(last), {facts.vector_rows, CudaFacts::kNotPacked}, device);
  plan.probe = plan_probe(part, device), plan.last = plan_probe(last, device);
  plan.centroid_bytes = bytes_of_centroids(last);
  plan.probed = saturated_product({plan.batch, plan.queries, plan.heads, p.plan.probes});
  Workspace counting;
  take_two_level(plan, counting);
  plan.workspace_bytes = counting.bytes() + std::max(plan.probe.workspace_bytes, plan.last.workspace_bytes);
}

CudaTwoLevelPlan plan_two_level_cuda(const TwoLevelProblem& p, const CudaFacts& facts,
                                     const CudaDevice& device) {
  CudaTwoLevelPlan plan{};
  const Shape& s = p.retrieve.shape;
  plan.sequences = facts.sequences;
  plan.exact = p.is_exact();
  if (plan.exact) {
    plan.kernel = "exact";
    plan.reason = p.plan.reason;
    plan.probe =
        plan_search_cuda(s, {p.retrieve.query.dtype, p.retrieve.unit_chunks, facts.sequences}, device);
    plan.workspace_bytes = plan.probe.workspace_bytes;
    return plan;
  }
  plan.kernel = "probe_refine";
  plan.reason = "centroids pooled, searched, and a warp per query in the superchunks that it probes";
  divide(plan, p);
  finish_two_level(plan, p, facts, device);
  return plan;
}

TwoLevelArrays take_two_level(const CudaTwoLevelPlan& plan, Workspace& workspace) {
  TwoLevelArrays a;
  a.chunk_begin = take_chunk_begin(plan.sequences, workspace);
  a.superchunk_begin = take_chunk_begin(plan.sequences, workspace);
  a.centroids = workspace.take<unsigned char>(plan.centroid_bytes);
  a.probed = workspace.take<int32_t>(plan.probed);
  a.scores = workspace.take<float>(plan.probed);
  return a;
}

}  // namespace resona
