#include "common/plan.h"

#include <algorithm>

namespace resona {
namespace {

// Additions that are worth waking a thread for: 0.2 ms of pooling. On a busy machine a wake-up costs more.
constexpr int64_t kWorthAThread = 1 << 18;
constexpr int64_t kTasksPerThread = 4;  // enough to balance causal work
// Scratch per thread, beyond which nothing is gained, and of all threads together.
constexpr int64_t kAttendBytes = 16 << 20, kAllAttendBytes = 256 << 20;
constexpr int64_t kKeptBytes = 80 << 20, kAllKeptBytes = 192 << 20;
constexpr int64_t kSearchBytes = 8 << 20, kAllSearchBytes = 128 << 20;
constexpr int64_t kSlotBytes = 32;     // score, index and product, and two candidates
constexpr int64_t kQueryBytes = 1536;  // products and candidates of a tile of chunks, and bookkeeping
constexpr int64_t kListEntryBytes =
    36;  // index, entry, sorted entry, row, bias and the slack of growing vectors

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t padded(int64_t n) { return ceil_div(n, 16) * 16; }

// The largest block, a multiple of `unit`, that still leaves every thread several tasks.
int64_t balanced(int64_t total, int64_t lanes, int64_t unit, int64_t most, const Device& device) {
  const int64_t tasks = std::max<int64_t>(1, device.threads * kTasksPerThread / std::max<int64_t>(1, lanes));
  return std::clamp(ceil_div(ceil_div(total, tasks), unit) * unit, unit, most);
}

int64_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// A chunk longer than the context and more slots than chunks are legal; they just never come to be.
int64_t chunk_size_of(const Shape& s) { return std::min(s.chunk_size, s.context + 1); }
int64_t slots_of(const Shape& s) { return std::min(s.top_k, s.context / s.chunk_size); }

// Packed keys and values of a tile, and the lists of the whole head.
int64_t kept_bytes(const Shape& s, int64_t key_tile, int64_t tiles) {
  return tiles * 2 * ceil_div(key_tile, 32) * 32 * ceil_div(s.head_dim, 32) * 32 * 2 +
         s.queries * slots_of(s) * kListEntryBytes;
}

// A head whose keys and values stay packed is the work of one thread: there must be enough of them, and room.
// Short chunks are many, and padded to whole tiles.
int64_t kept_tiles(const Shape& s, int64_t key_tile, const Device& device) {
  const int64_t heads = s.batch * s.kv_heads;
  const bool balanced = heads % device.threads == 0 || heads >= 8 * device.threads;
  if (s.chunk_size < 32 || heads == 0 || !balanced) return 0;
  const int64_t tiles = s.context / s.chunk_size * ceil_div(s.chunk_size, key_tile);
  const int64_t budget = std::min(kKeptBytes, kAllKeptBytes / device.threads);
  return kept_bytes(s, key_tile, tiles) <= budget ? tiles : 0;
}

// Chunks of a few tokens meet a few rows: reading them for each costs less than to pack them, to carry
// accumulators from chunk to chunk, and to multiply by padding. Measured with 4,096 tokens and 16 heads of
// 128, in 16 bits and in float32: S 2 with k 8 takes 0.55 and 0.6 of the time, S 4 with k 4 takes 0.8
// and 1.1, S 8 with k 2 takes 1.2 and 1.1.
constexpr int64_t kFewRows = 16, kShortRowBytes = 8;

bool meets_few_rows(const Shape& s, DType dtype) {
  const int64_t chunks = s.context / s.chunk_size;
  return chunks > 0 && s.chunk_size * size_of(dtype) <= kShortRowBytes &&
         s.queries * slots_of(s) <= kFewRows * chunks;
}

}  // namespace

PoolPlan plan_pool(const Shape& s, const Device& device) {
  const int64_t chunks = s.context / s.chunk_size;
  const int64_t elements = s.context * s.retrieval_heads * s.retrieval_dim;  // of one sequence
  if (s.batch <= 1 && s.retrieval_heads == 1 && elements <= kWorthAThread)
    return {"chunk_rows", "one pass over the context, too short for a second thread",
            std::max<int64_t>(1, chunks)};
  return {"chunk_rows", "one pass over the context, fp32 sums in token order",
          balanced(chunks, s.batch * s.retrieval_heads, 1, 256, device)};
}

SearchPlan plan_search(const Shape& s, DType embedding_dtype, const Device& device) {
  const int64_t lanes = s.batch * s.retrieval_heads;
  SearchPlan plan;
  // A block's queries, chunks and top-k lists stay in cache, and in bounds for any E and k.
  const int64_t budget = std::min(kSearchBytes, kAllSearchBytes / device.threads);
  const int64_t vector_bytes = 2 * s.retrieval_dim * accumulator_size(embedding_dtype);
  plan.tiles = device.tiles && embedding_dtype != DType::kFloat64;
  // Whole tiles of rows; so fast that a tile of chunks has to be loaded for more of them.
  const int64_t unit = plan.tiles ? 16 : 6, most = plan.tiles ? 768 : 192;
  const int64_t rows = budget / (2 * vector_bytes + kSlotBytes * slots_of(s) + kQueryBytes) / unit * unit;
  plan.query_block = balanced(s.queries, lanes, unit, std::clamp<int64_t>(rows, unit, most), device);
  plan.chunk_block = std::clamp<int64_t>(budget / vector_bytes / 16 * 16, 16, 64);
  if (embedding_dtype == DType::kFloat64) {
    plan.kernel = "exhaustive";
    plan.reason = "float64 embeddings: every score is canonical";
  } else if (plan.tiles) {
    plan.kernel = "filter_refine_tiles";
    plan.reason = "bf16 products with a proven error bound pass over chunks that cannot enter the top k";
  } else {
    plan.kernel = "filter_refine";
    plan.reason = "fp32 scores with a proven error bound pass over chunks that cannot enter the top k";
  }
  return plan;
}

AttendPlan plan_attend(const Shape& s, DType dtype, const Device& device) {
  AttendPlan plan;
  plan.tiles = device.tiles && dtype == DType::kBFloat16;
  plan.kernel = plan.tiles ? "chunk_stationary_tiles" : "chunk_stationary";
  plan.reason = "a chunk's keys and values are packed once and meet all queries that selected it";
  plan.row_tile = plan.tiles ? 64 : 48;
  plan.key_tile = std::min<int64_t>(padded(chunk_size_of(s)), 128);
  const int64_t chunks = std::max<int64_t>(1, s.context / s.chunk_size);
  const int64_t group = s.heads / std::max<int64_t>(1, s.kv_heads);
  plan.kept_tiles = plan.tiles ? kept_tiles(s, plan.key_tile, device) : 0;
  // Packing pays when a chunk meets about a row tile of queries inside one range; on tiles products are so
  // fast that fetching and packing a chunk weighs as much as three for every two of its tokens. Less so where
  // it stays packed.
  const int64_t slots = std::max<int64_t>(1, slots_of(s));
  const int64_t rows_per_chunk = plan.kept_tiles > 0 ? plan.key_tile
                                 : plan.tiles        ? std::max<int64_t>(32, 3 * plan.key_tile / 2)
                                                     : plan.row_tile;
  const int64_t wanted = ceil_div(rows_per_chunk * chunks, slots * group);
  const int64_t row_bytes = padded(s.head_dim) * accumulator_size(dtype) * group + kListEntryBytes * slots;
  const int64_t budget = std::min(kAttendBytes, kAllAttendBytes / device.threads);
  const int64_t affordable = std::max<int64_t>(64, budget / row_bytes);
  const int64_t fair = balanced(s.queries, s.batch * s.kv_heads, 64, int64_t{1} << 31, device);
  // Accumulators and queries of so many rows fit the second cache.
  const int64_t least = plan.tiles ? std::max<int64_t>(1024, 2048 / group) : 1024;
  plan.query_range = std::clamp<int64_t>(std::max(wanted, least), 64, std::min(affordable, fair));
  if (s.queries <= plan.query_range) plan.kept_tiles = 0;  // nothing comes back
  plan.by_query = meets_few_rows(s, dtype);
  const int64_t kv_heads = std::max<int64_t>(1, s.kv_heads);
  const bool balances =
      s.batch * s.retrieval_heads * ceil_div(s.queries, 64) >= device.threads * kTasksPerThread;
  plan.heads_per_task = balances ? kv_heads / std::max<int64_t>(1, s.retrieval_heads) : 1;
  plan.query_block = balanced(s.queries, s.batch * kv_heads / plan.heads_per_task, 16, 256, device);
  if (plan.by_query) {
    plan.kernel = "query_stationary";
    plan.reason =
        "a chunk meets too few queries to be packed: each reads the keys and values that it selected";
  }
  plan.list_chunks = balanced(chunks, s.batch * s.kv_heads, 1, 64, device);
  return plan;
}

Plan make_plan(const Shape& s, DType dtype, DType embedding_dtype, const Device& device) {
  Plan plan{plan_pool(s, device), plan_search(s, embedding_dtype, device), plan_attend(s, dtype, device), 0};
  const int64_t width = accumulator_size(dtype), group = s.heads / std::max<int64_t>(1, s.kv_heads);
  const int64_t dim = padded(s.head_dim), embedding = padded(s.retrieval_dim);
  const int64_t search = (3 * plan.search.query_block + 4 * plan.search.chunk_block) * embedding * width +
                         plan.search.query_block * (kQueryBytes + slots_of(s) * kSlotBytes);
  const AttendPlan& a = plan.attend;
  const int64_t by_chunk = a.query_range * (group * (dim + 2) * width + slots_of(s) * kListEntryBytes) +
                           (2 * a.key_tile + 2 * a.row_tile) * dim * width + a.row_tile * a.key_tile * width +
                           (a.kept_tiles > 0 ? kept_bytes(s, a.key_tile, a.kept_tiles) : 0);
  const int64_t by_query = slots_of(s) * (kSlotBytes + chunk_size_of(s) * width) + (2 * dim + 16) * width;
  const int64_t attend = a.by_query ? by_query : by_chunk;
  const int64_t chunk_tensor =
      s.batch * (s.context / s.chunk_size) * s.retrieval_heads * s.retrieval_dim * size_of(embedding_dtype);
  plan.workspace_bytes = device.threads * std::max(search, attend) + chunk_tensor;
  return plan;
}

}  // namespace resona
