#include "common/plan_attend_backward_cuda.h"

#include <algorithm>

namespace resona {
namespace {

constexpr int64_t kRangeStep = 64;  // queries
constexpr int64_t kMostSlots = (int64_t{1} << 31) - 1, kMostKeys = (int64_t{1} << 32) - 2;

// A slab costs 16 S D bytes per segment, against 12 D per row: little from 1024 rows on. Small problems of
// small chunks take shorter segments, to fill the device.
constexpr int64_t kLaneSegment = 128, kLongSegment = kAttendBackwardMostSegment, kShortSegment = 256,
                  kManyRows = 1 << 18, kLargeChunk = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t group_of(const Shape& s) { return s.heads / s.kv_heads; }
int64_t pitch_of(const Shape& s) { return ceil_div(s.head_dim, 8) * 8; }
int64_t slots_of(const Shape& s) {
  return saturated_product({s.batch, s.queries, s.retrieval_heads, s.top_k});
}
int64_t keys_of(const Shape& s) {
  return saturated_product({s.batch, s.retrieval_heads, s.context / s.chunk_size});
}

int64_t rows_of(const Shape& part) { return saturated_product({slots_of(part), group_of(part)}); }

bool has_ranges(const CudaAttendBackwardPlan& plan, const Shape& s) { return plan.queries < s.queries; }

// A smaller part has shorter lists, but its index may be of the kind that takes more for counts.
int64_t index_bytes(const CudaAttendBackwardPlan& plan, const Shape& s) {
  const auto first_of_last = [](int64_t all, int64_t part) { return all == 0 ? 0 : (all - 1) / part * part; };
  const int64_t batch = first_of_last(s.batch, plan.batch), query = first_of_last(s.queries, plan.queries);
  const auto bytes = [&](int64_t first_batch, int64_t first_query) {
    return plan_index_cuda(part_of(plan, s, first_batch, first_query), plan.device).workspace_bytes;
  };
  return std::max({bytes(0, 0), bytes(batch, 0), bytes(0, query)});
}

void count_workspace(CudaAttendBackwardPlan& plan, const Shape& s) {
  const Shape part = part_of(plan, s, 0, 0);
  plan.slab_rows = keys_of(part) == 0 ? 0 : 2 * ceil_div(rows_of(part), plan.segment);
  Workspace counting;
  take_attend_backward(plan, s, counting);
  plan.workspace_bytes = counting.bytes() + index_bytes(plan, s);
}

bool fits(CudaAttendBackwardPlan plan, const Shape& s, int64_t most_bytes) {
  const Shape part = part_of(plan, s, 0, 0);
  if (slots_of(part) > kMostSlots || keys_of(part) > kMostKeys) return false;
  count_workspace(plan, s);
  return plan.workspace_bytes <= most_bytes;
}

// What ranges of queries do not make smaller: d K and d V of a head so far, and a few numbers per row.
int64_t fixed_bytes(CudaAttendBackwardPlan plan, const Shape& s) {
  plan.batch = plan.heads = plan.queries = 1;
  count_workspace(plan, s);
  return plan.workspace_bytes;
}

// As many heads at once as fit; else as many batch entries, head by head; else as many queries of one, for
// which half of the bound is kept free of what cannot be cut.
void choose_part(CudaAttendBackwardPlan& plan, const Shape& s) {
  const auto fits_with = [&](int64_t batch, int64_t queries, int64_t heads, int64_t most_bytes) {
    CudaAttendBackwardPlan trial = plan;
    trial.batch = batch, trial.queries = queries, trial.heads = heads;
    return fits(trial, s, most_bytes);
  };
  constexpr int64_t kMost = kCudaWorkspaceBytes;
  plan.batch = std::max<int64_t>(1, s.batch), plan.queries = std::max<int64_t>(1, s.queries);
  plan.heads = largest_that_fits(s.kv_heads / s.retrieval_heads, [&](int64_t heads) {
    return fits_with(plan.batch, plan.queries, heads, kMost);
  });
  if (fits_with(plan.batch, plan.queries, plan.heads, kMost)) return;
  plan.batch =
      largest_that_fits(plan.batch, [&](int64_t batch) { return fits_with(batch, plan.queries, 1, kMost); });
  if (fits_with(plan.batch, plan.queries, 1, kMost)) return;
  const int64_t most = std::max(kMost, fixed_bytes(plan, s) + kMost / 2);
  const int64_t range = kRangeStep * largest_that_fits(ceil_div(plan.queries, kRangeStep), [&](int64_t n) {
                          return fits_with(1, n * kRangeStep, 1, most);
                        });
  plan.queries = std::min(plan.queries, range);
}

// The tokens that a warp holds in registers, if chunks are small and their lists short; else 0.
int64_t lane_keys(const Shape& s, int64_t width, const CudaTuning& tuning) {
  const int64_t most = width == 256 ? 4 : 8;
  if (s.chunk_size > most || rows_of(s) > saturated_product({tuning.lane_rows, keys_of(s)})) return 0;
  return width == 128 && s.chunk_size <= 4 ? 4 : most;
}

const char* reason_of(const CudaAttendBackwardPlan& plan, const Shape& s) {
  if (plan.lane_keys > 0)
    return "a warp per list: small chunks and few rows each, which would leave tiles empty";
  if (has_ranges(plan, s))
    return "keys stay while rows pass, a range of queries after another to bound the partial results";
  if (plan.batch < s.batch || plan.heads < s.kv_heads / s.retrieval_heads)
    return "keys stay while rows pass, some heads or batch entries at a time to bound the partial results";
  return "keys stay while rows pass; ordered sums of partial results instead of atomics";
}

}  // namespace

Shape part_of(const CudaAttendBackwardPlan& plan, const Shape& s, int64_t first_batch, int64_t first_query) {
  Shape part = s;
  part.batch = std::min(plan.batch, s.batch - first_batch);
  part.queries = std::min(plan.queries, s.queries - first_query);
  return part;
}

CudaAttendBackwardPlan plan_attend_backward_cuda(const Shape& s, DType dtype, const CudaFacts& facts,
                                                 bool has_bias, bool has_sink, const CudaDevice& device) {
  CudaAttendBackwardPlan plan{};
  plan.width = s.head_dim <= 64 ? 64 : s.head_dim <= 128 ? 128 : 256;
  plan.lane_keys = lane_keys(s, plan.width, device.tuning);
  plan.kernel = plan.lane_keys > 0    ? "chunk_lanes"
                : size_of(dtype) == 2 ? "chunk_stationary_mma"
                                      : "chunk_stationary_fma";
  plan.tile = (size_of(dtype) == 2 ? 64 : 32) / (plan.width == 256 ? 2 : 1);
  plan.partials = s.top_k > 1 || s.chunk_size > plan.tile;
  const int64_t rows = saturated_product({slots_of(s), s.heads / s.retrieval_heads});
  plan.segment = plan.lane_keys > 0                                 ? kLaneSegment
                 : rows >= kManyRows || s.chunk_size >= kLargeChunk ? kLongSegment
                                                                    : kShortSegment;
  plan.vector = facts.vector_rows;
  plan.normalise = has_bias || size_of(dtype) == 4, plan.sink = has_sink;
  plan.sequences = facts.sequences;
  plan.device = device;
  choose_part(plan, s);
  plan.reason = reason_of(plan, s);
  const Shape part = part_of(plan, s, 0, 0);
  const int64_t items = rows_of(part) / plan.segment + std::min(slots_of(part), keys_of(part));
  const int64_t block_items = plan.lane_keys > 0 ? kAttendBackwardLaneWarps : 1;
  plan.item_blocks = std::min(ceil_div(saturated_product({items, plan.heads}), block_items),
                              device.tuning.backward_item_blocks * device.sms);
  plan.row_blocks = device.tuning.backward_row_blocks * device.sms;
  count_workspace(plan, s);
  return plan;
}

AttendBackwardArrays take_attend_backward(const CudaAttendBackwardPlan& plan, const Shape& s,
                                          Workspace& workspace) {
  AttendBackwardArrays a{};
  const Shape part = part_of(plan, s, 0, 0);
  const int64_t rows = saturated_product({part.batch, s.queries, s.heads}), pitch = pitch_of(s);
  const int64_t partials = saturated_product({plan.heads, rows_of(part)});
  a.chunk_begin = take_chunk_begin(plan.sequences, workspace);
  a.delta = workspace.take<float>(rows);
  if (plan.normalise) a.factor = workspace.take<float>(rows);
  if (plan.sink)
    a.sink_sums =
        workspace.take<float>(saturated_product({s.batch, ceil_div(s.queries, kAttendSinkRows), s.heads}));
  if (plan.partials) a.query_partial = workspace.take<float>(saturated_product({partials, pitch}));
  if (plan.normalise) a.row_sums = workspace.take<float>(partials);
  a.slab = workspace.take<float>(saturated_product({plan.heads, plan.slab_rows, 2, s.chunk_size, pitch}));
  if (has_ranges(plan, s))
    a.carried =
        workspace.take<float>(saturated_product({plan.heads, s.retrieval_heads, s.context, 2, pitch}));
  return a;
}

}  // namespace resona
