#include "common/plan_search_cuda.h"

#include <algorithm>

namespace resona {
namespace {

constexpr int64_t kWindowBytes = 256 << 20;  // of the candidates of one launch
constexpr int64_t kExactBytes = 64 << 20;    // of the keys of all blocks
constexpr int64_t kBlocksPerSm = 2;
constexpr int64_t kSpare = 4;  // candidates beyond k: with fewer, near-ties leave rows uncertain
constexpr int64_t kPinnedElements = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t chunks_of(const Shape& s) { return s.context / s.chunk_size; }

int64_t row_bytes(const CudaSearchPlan& plan) {
  if (!plan.candidates || plan.groups() == 1) return 0;
  return plan.groups() * 16 * plan.bag_per_lane + plan.splits * 4;
}

void choose_candidates(CudaSearchPlan& plan, const Shape& s, DType dtype, const CudaDevice& device) {
  const int64_t slots = std::min(s.top_k, chunks_of(s));  // more never come to be
  plan.bag_per_lane = slots <= 2 ? 1 : slots <= 8 ? 3 : 5;
  plan.passes = slots <= 16 ? 1 : ceil_div(slots + kSpare, 4 * plan.bag_per_lane);
  const int64_t most_groups = kSearchMostCandidates / (4 * plan.bag_per_lane);
  plan.candidates = plan.passes <= most_groups;
  plan.pinned = size_of(dtype) == 2 && s.retrieval_dim <= kPinnedElements && plan.passes == 1;
  plan.splits = 1;
  if (!plan.candidates) return;
  const int64_t wanted = kBlocksPerSm * device.sms / std::max<int64_t>(1, plan.tiles);
  const int64_t steps = ceil_div(chunks_of(s), kSearchStepChunks);
  // A block of s splits takes steps / s, and the last of them finishes s times as many candidates.
  const int64_t most = std::min({wanted, device.tuning.search_splits, most_groups / plan.passes});
  while (plan.splits < most && device.tuning.search_finish * (plan.splits + 1) * (plan.splits + 1) <= steps)
    ++plan.splits;
}

const char* reason_of(const CudaSearchPlan& plan) {
  if (!plan.candidates) return "k above what bags of candidates hold: every row is scored canonically";
  if (plan.passes > 1) return "tensor-core products, bags of 20 candidates, a further pass for each 20 of k";
  if (plan.splits > 1)
    return "tensor-core products, bags in registers; few queries: blocks split the chunks, the last finishes";
  return "tensor-core products, bags in registers, candidates scored and certified by the same block";
}

}  // namespace

CudaSearchPlan plan_search_cuda(const Shape& s, const CudaSearchFacts& f, const CudaDevice& device) {
  CudaSearchPlan plan{};
  plan.sequences = f.sequences;
  plan.tiles = saturated_product({s.batch, s.retrieval_heads, ceil_div(s.queries, kSearchTileRows)});
  choose_candidates(plan, s, f.dtype, device);
  plan.norms = plan.candidates && !f.unit_chunks && plan.tiles > 0;
  plan.kernel = plan.candidates ? "register_bag" : "exact";
  plan.reason = reason_of(plan);
  const int64_t affordable = kWindowBytes / (kSearchTileRows * std::max<int64_t>(1, row_bytes(plan)));
  plan.window_tiles = std::clamp<int64_t>(plan.tiles, 1, std::max<int64_t>(1, affordable));
  const int64_t chunks = std::max<int64_t>(1, chunks_of(s));
  const int64_t steps = s.batch * s.retrieval_heads * ceil_div(chunks, kSearchStepChunks);
  if (plan.norms) plan.norm_blocks = std::clamp<int64_t>(ceil_div(steps, 4), 1, 8 * device.sms);
  if (!plan.candidates)
    plan.exact_blocks = std::clamp<int64_t>(kExactBytes / (8 * chunks), 1, kBlocksPerSm * device.sms);
  Workspace counting;
  take_chunk_begin(plan.sequences, counting);
  take_search(plan, s, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

int64_t launches_of(const CudaSearchPlan& plan) { return (plan.norms ? 1 : 0) + plan.windows(); }

SearchArrays take_search(const CudaSearchPlan& plan, const Shape& s, Workspace& workspace) {
  SearchArrays a{};
  if (!plan.candidates) {
    a.keys = workspace.take<uint64_t>(plan.exact_blocks * chunks_of(s));
    return a;
  }
  if (plan.groups() > 1) {
    const int64_t rows = plan.window_tiles * kSearchTileRows;
    a.candidates = workspace.take<int32_t>(rows * plan.groups() * 4 * plan.bag_per_lane);
    a.cutoffs = workspace.take<float>(rows * plan.splits);
  }
  if (plan.tickets() > 0) a.tickets = workspace.take<uint32_t>(plan.tickets());
  if (plan.norms)
    a.norms = workspace.take<float>(s.batch * s.retrieval_heads * ceil_div(chunks_of(s), kSearchStepChunks));
  return a;
}

}  // namespace resona
