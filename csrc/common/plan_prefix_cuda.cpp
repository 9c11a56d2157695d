#include "common/plan_prefix_cuda.h"

#include <algorithm>

namespace resona {
namespace {

constexpr int64_t kMostBlocksPerSm = 2;  // by registers
constexpr int64_t kLeastSegment = 512;   // tokens

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Lanes of a quad and of eight columns, or eight rows, then fall into different banks.
int64_t stride_of_columns(int64_t columns) {
  const int64_t whole = round_up(columns, 8);
  return whole % 16 == 8 ? whole : whole + 8;
}
int64_t stride_of_rows(int64_t columns) { return round_up(columns + 4, 8) - 4; }

int64_t lanes_of(const PrefixShape& s, int64_t batch, bool packed) {
  return saturated_product({packed ? s.sequences : batch, s.heads});
}

// The fewest slices that fit into shared memory; 16-byte loads want them to begin at multiples of eight.
PrefixLayout layout_that_fits(const PrefixShape& s, bool backward, int64_t shared_bytes) {
  int64_t slices = 1;
  PrefixLayout layout = prefix_layout(s.feature_dim, s.value_dim, slices, backward);
  while (layout.total * 4 > shared_bytes && layout.slice_values > 1)
    layout = prefix_layout(s.feature_dim, s.value_dim, ++slices, backward);
  return layout;
}

// Cutting costs the sums of all keys a second time, so it has to fill at least twice as many blocks.
void cut(CudaPrefixPlan& plan, const PrefixShape& s, const CudaPrefixFacts& f, const CudaDevice& device) {
  plan.segment = std::max<int64_t>(kPrefixTokens, s.tokens);
  plan.token_pieces = plan.prefix_pieces = 1;
  const int64_t blocks = saturated_product({lanes_of(s, plan.batch, f.packed), plan.layout.slices});
  const int64_t fit = std::clamp<int64_t>(device.shared_bytes / plan.shared_bytes, 1, kMostBlocksPerSm);
  const int64_t wanted = fit * device.sms;
  if (f.packed || blocks == 0 || 2 * blocks > wanted) return;
  const int64_t fair = round_up(ceil_div(s.tokens, ceil_div(wanted, blocks)), kPrefixTokens);
  plan.segment = std::max(kLeastSegment, fair);
  plan.token_pieces = std::max<int64_t>(1, ceil_div(s.tokens, plan.segment));
  plan.prefix_pieces = ceil_div(s.prefix_rows, plan.segment);
}

CudaPrefixPlan plan_part(const PrefixShape& s, int64_t batch, const CudaPrefixFacts& f,
                         const CudaDevice& device, bool backward) {
  CudaPrefixPlan plan{};
  plan.layout = layout_that_fits(s, backward, device.shared_bytes);
  plan.vector_rows = f.vector_rows;
  plan.vector_values = f.vector_rows && plan.layout.slice_values % 8 == 0;
  plan.batch = batch;
  plan.shared_bytes = int64_t{4} * plan.layout.total;
  cut(plan, s, f, device);
  plan.kernel = plan.is_cut() ? "segmented_sweep" : "sweep";
  plan.reason = f.packed        ? "a block per packed sequence and head"
                : plan.is_cut() ? "few sequences and heads: a block per segment, after their sums"
                                : "a block per sequence and head";
  const int64_t before = plan.is_cut() ? 2 : 0;  // sums, scan
  const int64_t gathers = plan.layout.slices > 1 ? 3 : 0;
  plan.launches = backward ? 2 * before + 2 + (plan.is_cut() ? 1 : 0) + gathers : before + 1;
  Workspace counting;
  backward ? take_prefix_backward(plan, s, counting) : take_prefix(plan, s, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

CudaPrefixPlan plan_parts(const PrefixShape& s, const CudaPrefixFacts& f, const CudaDevice& device,
                          bool backward) {
  const int64_t all = std::max<int64_t>(1, s.batch);
  if (f.packed) return plan_part(s, all, f, device, backward);
  const auto fits = [&](int64_t batch) {
    return plan_part(s, batch, f, device, backward).workspace_bytes <= kCudaWorkspaceBytes;
  };
  return plan_part(s, largest_that_fits(all, fits), f, device, backward);
}

}  // namespace

PrefixLayout prefix_layout(int64_t feature_dim, int64_t value_dim, int64_t slices, bool backward) {
  const int64_t f = feature_dim, fair = ceil_div(value_dim, slices);
  const int64_t values = slices > 1 && fair >= 8 ? round_up(fair, 8) : fair;
  const int64_t features = (f + 1) * (f + 2) / 2, feature_rows = round_up(features, 16);
  const int64_t columns = round_up(values + 1, 8), column_stride = stride_of_columns(columns);
  // A zero behind the row's own f + 1, and whole steps of eight from its second element on.
  const int64_t row_stride = stride_of_rows(std::max(f + 2, round_up(f, 8) + 1));
  PrefixLayout l{};
  l.feature_dim = static_cast<int>(f), l.value_dim = static_cast<int>(value_dim);
  l.slices = static_cast<int>(ceil_div(value_dim, values)), l.slice_values = static_cast<int>(values);
  l.features = static_cast<int>(features), l.feature_rows = static_cast<int>(feature_rows);
  l.column_tiles = static_cast<int>(columns / 8), l.column_stride = static_cast<int>(column_stride);
  l.row_stride = static_cast<int>(row_stride);
  const auto take = [&](int64_t floats) {
    const int begin = l.total;
    l.total += static_cast<int>(round_up(floats, 32));
    return begin;
  };
  l.state = take(l.state_size());
  l.query = take(kPrefixTokens * row_stride), l.key = take(kPrefixTokens * row_stride);
  l.value = take(kPrefixTokens * column_stride);
  l.weight = take(kPrefixTokens * kPrefixWeightStride);
  l.pairs = take(2 * feature_rows), l.scalars = take(3 * kPrefixTokens);
  if (!backward) return l;
  l.gradient = take(kPrefixTokens * column_stride);
  l.score_gradient = take(kPrefixTokens * kPrefixWeightStride);
  l.row_gradient = take(kPrefixTokens * row_stride);
  return l;
}

CudaPrefixPlan plan_prefix_cuda(const PrefixShape& s, const CudaPrefixFacts& f, const CudaDevice& device) {
  return plan_parts(s, f, device, false);
}

CudaPrefixPlan plan_prefix_backward_cuda(const PrefixShape& s, const CudaPrefixFacts& f,
                                         const CudaDevice& device) {
  return plan_parts(s, f, device, true);
}

PrefixArrays take_prefix(const CudaPrefixPlan& plan, const PrefixShape& s, Workspace& workspace) {
  PrefixArrays a{};
  if (plan.is_cut())
    a.slots = workspace.take<float>(saturated_product(
        {plan.batch, s.heads, plan.layout.slices, plan.pieces(), plan.layout.state_size()}));
  return a;
}

PrefixArrays take_prefix_backward(const CudaPrefixPlan& plan, const PrefixShape& s, Workspace& workspace) {
  PrefixArrays a = take_prefix(plan, s, workspace);
  const int64_t rows = saturated_product({plan.batch, s.heads, s.tokens});
  a.inverse = workspace.take<float>(rows);
  a.denominator_gradient = workspace.take<float>(rows);
  if (plan.layout.slices == 1) return a;
  const int64_t row = int64_t{plan.layout.slices} * s.feature_dim;
  a.query_partials = workspace.take<float>(saturated_product({rows, row}));
  a.key_partials = workspace.take<float>(saturated_product({rows, row}));
  a.prefix_partials = workspace.take<float>(saturated_product({plan.batch, s.heads, s.prefix_rows, row}));
  return a;
}

}  // namespace resona
