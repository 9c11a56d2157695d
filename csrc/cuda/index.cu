#include "cuda/index.cuh"

#include <stdexcept>
#include <string>

#include "cuda/build_index.cuh"
#include "cuda/launch.cuh"

namespace resona::cuda {
namespace {

static_assert(IndexConfig::kThreads == kIndexThreads && IndexConfig::kTile == kIndexTile &&
                  IndexConfig::kDigitBits == kIndexDigitBits && ScanConfig::kTile == kScanTile,
              "plans count with these");

// Every kernel waits for the one before it, whoever launched that.
template <class Parameters>
void launch_next(const char* name, int64_t blocks, const CudaIndexPlan& plan, Stream stream,
                 void (*kernel)(Parameters), const Parameters& parameters) {
  static_assert(ScanConfig::kThreads == IndexConfig::kThreads, "one block size for all");
  launch({name, {blocks}, IndexConfig::kThreads, 0, true, plan.reason}, stream, kernel, parameters);
}

void scan(uint32_t* entries, uint32_t* totals, int64_t count, const CudaIndexPlan& plan, Stream stream) {
  const ScanParams p{entries, totals, count};
  launch_next("scan_tiles_kernel", (count + kScanTile - 1) / kScanTile, plan, stream, scan_tiles_kernel, p);
  launch_next("scan_totals_kernel", 1, plan, stream, scan_totals_kernel, p);
}

void sort(const IndexArrays& a, const CudaIndexPlan& plan, Stream stream) {
  for (int64_t pass = 0; pass < plan.passes; ++pass) {
    const int64_t from = pass % 2;
    const IndexPassParams p{a.keys[from],
                            pass == 0 ? nullptr : a.slots[from],
                            a.keys[1 - from],
                            a.slots[1 - from],
                            a.counts,
                            a.totals,
                            plan.slots,
                            plan.tiles,
                            static_cast<int>(pass * plan.digit_bits),
                            static_cast<int>(plan.digit_bits)};
    launch_next("index_count_kernel", plan.tiles, plan, stream, index_count_kernel, p);
    scan(a.counts, a.totals, a.count_entries, plan, stream);
    launch_next("index_scatter_kernel", plan.tiles, plan, stream, index_scatter_kernel, p);
  }
}

IndexKeysParams keys_of(const IndexProblem& p, uint32_t* keys) {
  const Shape& s = p.shape;
  IndexKeysParams k{};
  k.indices = p.indices;
  k.keys = keys;
  k.batch = s.batch, k.queries = s.queries, k.heads = s.retrieval_heads, k.top_k = s.top_k;
  k.context = s.context, k.chunk_size = s.chunk_size, k.chunks_per_batch = s.context / s.chunk_size;
  k.packed = p.packed;
  k.queries_before = p.queries_before, k.queries_behind = p.queries_behind;
  return k;
}

IndexResultParams results_of(const IndexProblem& p, const IndexArrays& a, const CudaIndexPlan& plan) {
  IndexResultParams r{};
  r.keys = a.sorted_keys, r.slots = a.sorted_slots;
  r.list = a.list, r.position = a.position;
  r.offsets = a.offsets, r.tile_begin = a.tile_begin;
  r.count = plan.slots, r.slots_per_query = p.shape.retrieval_heads * p.shape.top_k;
  r.unused_key = plan.keys;
  r.rows_per_query = p.rows_per_query, r.tile_rows = p.tile_rows;
  return r;
}

void check_limits(const CudaIndexPlan& plan) {
  if (plan.slots < int64_t{1} << 31 && plan.keys < (int64_t{1} << 32) - 1) return;
  throw std::runtime_error(
      "resona::cuda: index: expected B * T * R * k < 2^31 and B * R * C < 2^32 - 1, got " +
      std::to_string(plan.slots) + " and " + std::to_string(plan.keys));
}

}  // namespace

IndexArrays build_index(const IndexProblem& p, const CudaIndexPlan& plan, Workspace& workspace,
                        Stream stream) {
  check_limits(plan);
  const IndexArrays a = take_index(plan, workspace);
  launch_next("index_keys_kernel", plan.slot_blocks, plan, stream, index_keys_kernel, keys_of(p, a.keys[0]));
  sort(a, plan, stream);
  launch_next("index_offsets_kernel", plan.key_blocks, plan, stream, index_offsets_kernel,
              results_of(p, a, plan));
  scan(a.tile_begin, a.tile_totals, plan.keys + 1, plan, stream);
  return a;
}

void write_lists(const IndexProblem& p, const IndexArrays& a, const CudaIndexPlan& plan, Stream stream) {
  launch_next("index_lists_kernel", plan.slot_blocks, plan, stream, index_lists_kernel,
              results_of(p, a, plan));
}

}  // namespace resona::cuda
