#include "common/plan_fused_cuda.h"

#include <algorithm>

namespace resona {
namespace {

constexpr int64_t kSlackBytes = 4 << 20;    // the counts, and what alignment takes
constexpr int64_t kChunkBytes = 128 << 20;  // of a part: the stages want the rest
constexpr int64_t kSearchAttendDim = 128;

int64_t chunk_bytes(const Shape& s, int64_t batch, const CudaFusedFacts& f) {
  return saturated_product(
      {batch, s.context / s.chunk_size, s.retrieval_heads, s.retrieval_dim, size_of(f.embedding_dtype)});
}

// Whether one launch for search and attention exists and pays: see the head of search_attend.cuh.
bool attends_at_once(const Shape& s, const CudaFusedFacts& f, const CudaFusedStages& stages,
                     const CudaDevice& device) {
  const CudaSearchPlan& search = stages.search;
  const CudaAttendPlan& attend = stages.attend;
  const DType dtype = f.attend.dtype;
  const bool tiny = s.top_k <= kSearchAttendMostSlots &&
                    saturated_product({s.top_k, s.chunk_size}) <= device.tuning.attended_keys;
  const bool searches = search.candidates && search.bag_per_lane == 1 && search.groups() == 1 &&
                        search.pinned == (size_of(dtype) == 2);
  const bool has_teams = attend.path == AttendPath::kQuery && attend.heads == 1 && attend.splits == 1 &&
                         attend.vector && attend.dim <= kSearchAttendDim;
  return tiny && f.embedding_dtype == dtype && searches && has_teams && search.tiles > 0 &&
         search.tiles >= device.tuning.attended_tiles * device.sms;
}

CudaFusedStages plan_stages(Shape s, int64_t batch, const CudaFusedFacts& f, int64_t reserved_bytes,
                            const CudaDevice& device) {
  s.batch = batch;
  const bool vector_chunks = s.retrieval_dim * size_of(f.embedding_dtype) % 16 == 0;
  CudaFusedStages stages;
  stages.pool = plan_pool_cuda(s, {f.vector_context && vector_chunks, CudaFacts::kNotPacked}, device);
  stages.search =
      plan_search_cuda(s, {f.embedding_dtype, /*unit_chunks=*/true, CudaFacts::kNotPacked}, device);
  CudaAttendFacts attend = f.attend;
  attend.rows.sequences = CudaFacts::kNotPacked;
  attend.reserved_bytes = reserved_bytes;
  stages.attend = plan_attend_cuda(s, attend, device);
  const CudaAttendPlan& a = stages.attend;
  const bool is_whole = batch > 0 && a.range_batch == batch && a.range_queries == s.queries;
  stages.counted = a.path == AttendPath::kChunk && is_whole && a.index.quick && stages.search.candidates;
  stages.attends = attends_at_once(s, f, stages, device);
  stages.launches = launches_of(stages.pool) + launches_of(stages.search) + launches_of(stages.attend, s) -
                    (stages.counted || stages.attends ? 1 : 0);
  return stages;
}

int64_t scratch_of(const CudaFusedStages& stages) {
  return std::max(stages.search.workspace_bytes, stages.attend.workspace_bytes);
}

const char* reason_of(const CudaFusedPlan& plan, const Shape& s) {
  if (plan.part.attends && plan.last.attends)
    return "few keys per row, rows enough for every block: the search attends to what it finds";
  if (plan.batch < s.batch)
    return "stages chained in one workspace, some batch entries at a time to bound their chunks";
  return "stages chained in one workspace: chunks stay from pool to search";
}

void divide(CudaFusedPlan& plan, int64_t batch, const Shape& s, const CudaFusedFacts& f,
            const CudaDevice& device) {
  plan.batch = batch;
  plan.chunk_bytes = chunk_bytes(s, std::min(batch, s.batch), f);
  const int64_t before_last = std::max<int64_t>(0, s.batch - 1) / batch;
  plan.part = plan_stages(s, std::min(batch, s.batch), f, plan.chunk_bytes + kSlackBytes, device);
  plan.last = plan_stages(s, s.batch - before_last * batch, f, plan.chunk_bytes + kSlackBytes, device);
  plan.reason = reason_of(plan, s);
  const int64_t packed = plan.sequences == CudaFacts::kNotPacked ? 0 : 1;
  plan.launches = s.batch == 0 ? 0 : packed + before_last * plan.part.launches + plan.last.launches;
  Workspace counting;
  take_fused(plan, counting);
  plan.workspace_bytes = counting.bytes() + std::max(scratch_of(plan.part), scratch_of(plan.last));
}

}  // namespace

CudaFusedPlan plan_fused_cuda(const Shape& s, const CudaFusedFacts& f, const CudaDevice& device) {
  CudaFusedPlan plan{};
  plan.kernel = "pool_search_attend";
  plan.sequences = f.attend.rows.sequences;
  const auto fits = [&](int64_t batch) { return chunk_bytes(s, batch, f) <= kChunkBytes; };
  divide(plan, largest_that_fits(std::max<int64_t>(1, s.batch), fits), s, f, device);
  return plan;
}

FusedArrays take_fused(const CudaFusedPlan& plan, Workspace& workspace) {
  FusedArrays a;
  a.chunk_begin = take_chunk_begin(plan.sequences, workspace);
  a.chunks = workspace.take<unsigned char>(plan.chunk_bytes);
  a.tile_counts = workspace.take<uint16_t>(std::max(plan.part.counts(), plan.last.counts()));
  return a;
}

}  // namespace resona
