#include "common/plan_two_level.h"

#include <algorithm>

namespace resona {
namespace {

constexpr int64_t kProbesPerSlot = 2;  // the k best chunks lie in up to k superchunks, and centroids blur
constexpr int64_t kFewestProbes = 16;
constexpr int64_t kSmallestSuperchunk = 16;  // below, a centroid stands for too little to be worth its score
constexpr int64_t kRefineBytes = 32 << 20, kAllRefineBytes = 256 << 20;  // scratch per thread and of all
constexpr int64_t kMostRows = 8192;

int64_t chunks_of(const Shape& s) { return s.context / s.chunk_size; }

// The power of two nearest to sqrt(C / m): a query scores C / P centroids and m P chunks, and their sum is
// least there.
int64_t balanced_superchunk(int64_t chunks, int64_t probes) {
  int64_t size = kSmallestSuperchunk;
  while (size * size <= chunks / probes / 2) size *= 2;  // 2 P P m <= C, without a product that overflows
  return size;
}

}  // namespace

TwoLevelPlan plan_two_level(const Shape& s, std::optional<int64_t> superchunk_size,
                            std::optional<int64_t> probes) {
  const int64_t chunks = chunks_of(s);
  // More slots or probes than chunks, and longer superchunks, are legal; they just never come to be. So any
  // number may come in here, and none is multiplied or added to before it is known to be small.
  const int64_t most = std::max<int64_t>(1, chunks);
  const int64_t slots = std::clamp<int64_t>(s.top_k, 1, most);
  const int64_t enough =
      slots > most / kProbesPerSlot ? most : std::max(kFewestProbes, kProbesPerSlot * slots);
  TwoLevelPlan plan;
  plan.probes = std::min(probes.value_or(enough), most);
  const int64_t size =
      superchunk_size.has_value() ? *superchunk_size : balanced_superchunk(chunks, plan.probes);
  plan.superchunk_size = size > most ? most + 1 : size;
  plan.reason = chunks / plan.superchunk_size <= plan.probes
                    ? "no more superchunks than probes: the same as the exact search"
                    : "as many chunks inside the probed superchunks as centroids, up to a factor of two";
  if (superchunk_size.has_value()) plan.reason = "superchunk_size as given";
  return plan;
}

Shape centroid_shape(const TwoLevelProblem& p) {
  Shape s = p.retrieve.shape;
  s.queries = s.context = chunks_of(s);
  s.chunk_size = p.plan.superchunk_size;
  return s;
}

Shape probe_shape(const TwoLevelProblem& p) {
  Shape s = p.retrieve.shape;
  s.chunk_size *= p.plan.superchunk_size;
  s.top_k = p.plan.probes;
  return s;
}

SearchPlan plan_refine(const TwoLevelProblem& p, const Device& device) {
  const Shape& s = p.retrieve.shape;
  SearchPlan plan = plan_search(s, p.retrieve.query.dtype, device);
  plan.kernel = "superchunk_stationary";
  plan.reason = "a superchunk is packed once for all queries of a block that probe it";
  // The more queries, the more of them share a superchunk.
  const int64_t element = p.retrieve.query.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t slots = std::min(s.top_k, chunks_of(s));
  const int64_t row_bytes = 3 * s.retrieval_dim * element + 32 * slots + 32 * p.plan.probes + 1536;
  const int64_t affordable = std::min(kRefineBytes, kAllRefineBytes / device.threads) / row_bytes;
  const int64_t fair = s.batch * s.retrieval_heads * s.queries / (4 * device.threads);
  plan.query_block = std::max(plan.query_block, std::min({affordable, fair, kMostRows}));
  return plan;
}

}  // namespace resona
