#include "common/plan_attend_cuda.h"

#include <algorithm>

namespace resona {
namespace {

constexpr int64_t kDenseQueries = 64;  // a tile of rows
constexpr int64_t kRowTile = 64;
constexpr int64_t kThreads = 128;
constexpr int64_t kLeastRangeBytes = 128 << 20;  // whatever the rest of the call takes

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t group_of(const Shape& s) { return s.heads / std::max<int64_t>(1, s.kv_heads); }

// A chunk longer than the context is legal, and so is a k of any size.
int64_t keys_of_row(const Shape& s) {
  const int64_t chunks = s.context / s.chunk_size;
  return chunks == 0 ? 0 : std::min(s.top_k, chunks) * s.chunk_size;
}

int64_t instance_dim(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// ---- the choice

bool takes_dense(const Shape& s, const CudaAttendFacts& f, const CudaTuning& tuning) {
  const double selected = static_cast<double>(s.top_k) * static_cast<double>(s.chunk_size);
  return size_of(f.dtype) == 2 && f.distinct && !f.bias && s.context <= tuning.dense_context &&
         s.queries >= kDenseQueries &&
         200 * selected > static_cast<double>(tuning.dense_percent) * static_cast<double>(s.context);
}

// Bytes per row and selected chunk, from attend_chunk.cuh and attend_query.cuh, in units of D elements.
bool takes_chunks(const Shape& s, const CudaAttendFacts& f, const CudaTuning& tuning) {
  const int64_t chunks = s.context / s.chunk_size, group = group_of(s);
  if (chunks == 0 || s.chunk_size < tuning.chunk_tokens) return false;
  const int64_t slots = std::min(s.top_k, chunks);
  if (saturated_product({s.queries, slots, group}) < saturated_product({tuning.chunk_rows, chunks}))
    return false;
  return size_of(f.dtype) == 2 ? 3 * group < 2 * s.chunk_size : 5 * group < 2 * s.chunk_size;
}

// ---- query paths

void share_rows(CudaAttendPlan& plan, const Shape& s, int64_t teams, int64_t tile, const CudaDevice& device) {
  const int64_t rows = saturated_product({s.batch, s.queries, s.kv_heads, ceil_div(group_of(s), plan.heads)});
  const int64_t keys = keys_of_row(s);
  plan.splits = 1;
  while (plan.splits < teams && rows * plan.splits < 8 * teams * device.sms && keys >= 4 * tile * plan.splits)
    plan.splits *= 2;
  plan.blocks =
      std::clamp<int64_t>(ceil_div(rows * plan.splits, teams), 1, device.tuning.query_blocks * device.sms);
}

void plan_lanes(CudaAttendPlan& plan, const Shape& s, const CudaAttendFacts& f, const CudaDevice& device) {
  plan.path = AttendPath::kQuery;
  plan.kernel = "query_lanes";
  plan.reason = "each row gathers its keys: few keys per row, float32, or rows off 16-byte borders";
  int64_t lanes = !plan.vector || s.head_dim > 128 ? 32 : s.head_dim > 64 ? 16 : 8;
  plan.heads = 1;
  if (f.dtype == DType::kFloat32 && plan.vector && group_of(s) >= 4)
    plan.heads = 4, lanes = std::max<int64_t>(16, lanes);
  plan.dim = 8 * lanes;
  share_rows(plan, s, kThreads / lanes, 8, device);
}

void plan_mma(CudaAttendPlan& plan, const Shape& s, const CudaDevice& device) {
  plan.path = AttendPath::kQueryMma;
  plan.kernel = "query_mma";
  plan.reason = "each row gathers its keys into tensor-core tiles, heads of a group side by side";
  plan.dim = instance_dim(s.head_dim);
  plan.heads = plan.dim == 128 && group_of(s) > 8 ? 16 : 8;
  share_rows(plan, s, kThreads / 32, 16, device);
}

// ---- chunk path

void plan_chunk_tiles(CudaAttendPlan& plan, const Shape& s, const CudaAttendFacts& f,
                      const CudaDevice& device) {
  plan.dim = instance_dim(s.head_dim);
  const int64_t row_bytes = plan.dim * size_of(f.dtype);
  const int64_t tile = std::min<int64_t>(64, 16384 / row_bytes);
  plan.key_rows = ceil_div(std::min(s.chunk_size, tile), 16) * 16;
  const auto bytes = [&](int64_t slots, int64_t buffers) {
    return 4096 + (2 * plan.key_rows * slots + kRowTile * buffers) * row_bytes;
  };
  const bool several = s.chunk_size > tile;
  plan.key_slots = several && bytes(2, 2) <= device.shared_bytes ? 2 : 1;
  plan.ahead = (!several || plan.key_slots == 2) && bytes(plan.key_slots, 2) <= device.shared_bytes;
  const int64_t chunks = s.context / s.chunk_size;
  const int64_t rows =
      ceil_div(saturated_product({s.queries, std::min(s.top_k, chunks), group_of(s)}), chunks);
  plan.item_rows = std::clamp<int64_t>(ceil_div(rows, kRowTile) * kRowTile, kRowTile,
                                       device.tuning.item_rows / kRowTile * kRowTile);
}

// Key/value heads that share a list.
int64_t heads_of_list(const Shape& s) { return s.kv_heads / s.retrieval_heads; }

void size_range(CudaAttendPlan& plan, const Shape& s, int64_t batch, int64_t queries, int64_t heads,
                const CudaDevice& device) {
  Shape range = s;
  range.batch = plan.range_batch = batch, range.queries = plan.range_queries = queries;
  plan.range_heads = heads;
  plan.index = plan_index_cuda(range, device);
  const int64_t items = saturated_product({plan.index.slots, group_of(s)}) / plan.item_rows + plan.index.keys;
  plan.blocks =
      std::clamp<int64_t>(saturated_product({items, heads}), 1, device.tuning.chunk_blocks * device.sms);
  const int64_t rows = saturated_product({batch, queries, s.retrieval_heads, heads, group_of(s)});
  plan.merge_blocks = std::clamp<int64_t>(ceil_div(rows, 4), 1, device.tuning.merge_blocks * device.sms);
  range.batch = s.batch == 0 ? 0 : (s.batch - 1) % batch + 1;
  range.queries = s.queries == 0 ? 0 : (s.queries - 1) % queries + 1;
  plan.last_index = plan_index_cuda(range, device);
  Workspace counting;
  take_chunk_begin(plan.sequences, counting);
  take_attend(plan, s, counting);
  plan.workspace_bytes =
      counting.bytes() + std::max(plan.index.workspace_bytes, plan.last_index.workspace_bytes);
}

bool fits(const CudaAttendPlan& plan, int64_t most_bytes) {
  return plan.workspace_bytes <= most_bytes && plan.index.slots < int64_t{1} << 31 &&
         plan.index.keys < (int64_t{1} << 32) - 1;
}

void plan_chunks(CudaAttendPlan& plan, const Shape& s, const CudaAttendFacts& f, const CudaDevice& device) {
  plan.path = AttendPath::kChunk;
  plan.kernel = "chunk_stationary";
  plan.reason = "keys and values of a chunk stay while the rows that selected it pass: fewest bytes per row";
  plan.half_partials = f.dtype == DType::kBFloat16;
  plan_chunk_tiles(plan, s, f, device);
  const int64_t most_bytes = std::max(kCudaWorkspaceBytes - f.reserved_bytes, kLeastRangeBytes);
  const int64_t heads = heads_of_list(s);
  const auto range_fits = [&](int64_t batch, int64_t queries, int64_t heads) {
    size_range(plan, s, batch, queries, heads, device);
    return fits(plan, most_bytes);
  };
  if (range_fits(s.batch, s.queries, heads) || range_fits(1, s.queries, heads)) {
    if (plan.range_batch < s.batch)
      plan.reason = "keys and values of a chunk stay while its rows pass; one batch entry at a time";
    return;
  }
  // Each range of queries reads keys and values again, and has an index; heads have nothing to repeat. So
  // some heads at a time first. Equal parts, as few as fit.
  if (range_fits(1, s.queries, 1)) {
    const int64_t most = largest_that_fits(heads, [&](int64_t h) { return range_fits(1, s.queries, h); });
    range_fits(1, s.queries, ceil_div(heads, ceil_div(heads, most)));
    plan.reason = "keys and values of a chunk stay while its rows pass; some heads at a time";
    return;
  }
  const auto tiles_fit = [&](int64_t tiles) { return range_fits(1, tiles * kRowTile, 1); };
  const int64_t most = largest_that_fits(ceil_div(s.queries, kRowTile), tiles_fit) * kRowTile;
  const int64_t ranges = ceil_div(s.queries, most);
  tiles_fit(ceil_div(ceil_div(s.queries, ranges), kRowTile));
  plan.reason =
      "keys and values of a chunk stay while its rows pass; a head and a range of queries at a time";
}

}  // namespace

CudaAttendPlan plan_attend_cuda(const Shape& s, const CudaAttendFacts& f, const CudaDevice& device) {
  CudaAttendPlan plan{};
  plan.vector = f.rows.vector_rows;
  plan.sequences = f.rows.sequences;
  if (takes_dense(s, f, device.tuning)) {
    plan.path = AttendPath::kDense;
    plan.kernel = "dense_masked";
    plan.reason = "short context: its rows select so much that all keys, once per 64 rows, are fewer bytes";
    plan.dim = instance_dim(s.head_dim);
    plan.blocks = saturated_product({ceil_div(s.queries * group_of(s), kRowTile), s.kv_heads, s.batch});
  } else if (takes_chunks(s, f, device.tuning)) {
    plan_chunks(plan, s, f, device);
    return plan;
  } else if (size_of(f.dtype) == 2 && plan.vector && (group_of(s) >= 4 || keys_of_row(s) >= 32)) {
    plan_mma(plan, s, device);
  } else {
    plan_lanes(plan, s, f, device);
  }
  Workspace counting;
  take_chunk_begin(plan.sequences, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

int64_t launches_of(const CudaAttendPlan& plan, const Shape& s) {
  if (plan.path != AttendPath::kChunk) return plan.blocks > 0 ? 1 : 0;
  if (s.batch == 0 || s.queries == 0) return 0;
  // Several entries of a batch form a range only with all their queries.
  const int64_t batches = ceil_div(s.batch, plan.range_batch), rows = ceil_div(s.queries, plan.range_queries);
  const int64_t last = plan.range_batch > 1 ? 1 : batches;
  const int64_t parts = ceil_div(heads_of_list(s), plan.range_heads);
  return (batches * rows - last) * launches_of(plan.index) + last * launches_of(plan.last_index) +
         batches * rows * parts * (s.top_k > 1 ? 2 : 1);
}

AttendArrays take_attend(const CudaAttendPlan& plan, const Shape& s, Workspace& workspace) {
  AttendArrays a{};
  if (plan.path != AttendPath::kChunk || s.top_k == 1) return a;
  const int64_t rows = saturated_product({plan.index.slots, plan.range_heads, group_of(s)});
  const int64_t elements = saturated_product({rows, ceil_div(s.head_dim, 8) * 8});
  if (plan.half_partials) {
    a.partial = workspace.take<uint16_t>(elements);
    a.partial_scale = workspace.take<float>(rows);
  } else {
    a.partial = workspace.take<float>(elements);
  }
  a.partial_lse = workspace.take<float>(rows);
  return a;
}

}  // namespace resona
