#include <stdexcept>
#include <string>

#include "cuda/build_index.cuh"
#include "cuda/index_quick.cuh"
#include "cuda/index_sort.cuh"
#include "cuda/launch.cuh"

namespace resona::cuda {
namespace {

static_assert(IndexConfig::kThreads == kIndexThreads && IndexConfig::kTile == kIndexTile &&
                  IndexConfig::kDigitBits == kIndexDigitBits && ScanConfig::kTile == kScanTile &&
                  kIndexQueries == kIndexTileQueries && kIndexColumns == kIndexCountsPerLoad &&
                  IndexPlaceConfig::kMostKeys == kIndexMostKeys &&
                  IndexTileCountsConfig::kMostChunks == kIndexMostKeys &&
                  IndexPlaceConfig::kWarps == kIndexMostBlockTiles &&
                  kIndexQueries * kIndexMostTopK < 1 << 16,
              "plans count with these");

// Every kernel waits for the one before it, whoever launched that.
template <class Parameters>
void launch_next(const char* name, int64_t blocks, const CudaIndexPlan& plan, Stream stream,
                 void (*kernel)(Parameters), const Parameters& parameters,
                 int threads = IndexConfig::kThreads, int64_t shared_bytes = 0) {
  launch({name, {blocks}, threads, shared_bytes, true, plan.reason}, stream, kernel, parameters);
}

IndexSlots slots_of(const IndexProblem& p) {
  const Shape& s = p.shape;
  IndexSlots slots{};
  slots.indices = p.indices;
  slots.batch = s.batch, slots.queries = s.queries, slots.heads = s.retrieval_heads, slots.top_k = s.top_k;
  slots.context = s.context, slots.chunk_size = s.chunk_size, slots.chunks = s.context / s.chunk_size;
  slots.packed = p.packed;
  slots.queries_before = p.queries_before, slots.queries_behind = p.queries_behind;
  return slots;
}

// ---- few keys

void count_and_place(const IndexProblem& p, const IndexArrays& a, const CudaIndexPlan& plan, Stream stream) {
  IndexTiles tiles{slots_of(p), a.tile_counts, (p.shape.queries + kIndexQueries - 1) / kIndexQueries,
                   static_cast<int>(plan.count_pitch)};
  if (p.tile_counts == nullptr)
    launch_next("index_tile_counts_kernel", plan.query_tiles, plan, stream, index_tile_counts_kernel, tiles,
                IndexTileCountsConfig::kThreads);
  else
    tiles.counts = const_cast<uint16_t*>(p.tile_counts);  // index_place_kernel only reads
  IndexPlaceParams place{};
  place.tiles = tiles;
  place.sorted_slots = a.sorted_slots;
  if (p.wants_positions) place.list = a.list, place.position = a.position;
  place.offsets = a.offsets, place.tile_begin = a.tile_begin, place.tile_totals = a.tile_totals;
  place.rows_per_query = p.rows_per_query, place.tile_rows = p.tile_rows;
  place.block_tiles = static_cast<int>(plan.block_tiles);
  place.group_blocks = static_cast<int>((tiles.group_tiles + plan.block_tiles - 1) / plan.block_tiles);
  if (place.group_blocks == 0) place.group_blocks = 1;
  launch_next("index_place_kernel", plan.blocks, plan, stream, index_place_kernel, place,
              IndexPlaceConfig::kThreads, plan.shared_bytes);
}

// ---- any number of keys

void scan(uint32_t* entries, uint32_t* totals, int64_t count, const CudaIndexPlan& plan, Stream stream) {
  static_assert(ScanConfig::kThreads == IndexConfig::kThreads, "one block size for all");
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

void sort_and_list(const IndexProblem& p, const IndexArrays& a, const CudaIndexPlan& plan, Stream stream) {
  launch_next("index_keys_kernel", plan.slot_blocks, plan, stream, index_keys_kernel,
              IndexKeysParams{slots_of(p), a.keys[0]});
  sort(a, plan, stream);
  IndexResultParams r{};
  r.keys = a.keys[plan.passes % 2], r.slots = a.sorted_slots;
  r.list = a.list, r.position = a.position;
  r.offsets = a.offsets, r.tile_begin = a.tile_begin;
  r.count = plan.slots, r.slots_per_query = p.shape.retrieval_heads * p.shape.top_k;
  r.unused_key = plan.keys;
  r.rows_per_query = p.rows_per_query, r.tile_rows = p.tile_rows;
  launch_next("index_offsets_kernel", plan.key_blocks, plan, stream, index_offsets_kernel, r);
  scan(a.tile_begin, a.tile_totals, plan.keys + 1, plan, stream);
  if (p.wants_positions)
    launch_next("index_lists_kernel", plan.slot_blocks, plan, stream, index_lists_kernel, r);
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
  if (p.tile_counts != nullptr && !plan.quick)
    throw std::logic_error("resona::cuda: index: counts of tiles are for quick plans");
  const IndexArrays a = take_index(plan, workspace);
  (plan.quick ? count_and_place : sort_and_list)(p, a, plan, stream);
  return a;
}

}  // namespace resona::cuda
