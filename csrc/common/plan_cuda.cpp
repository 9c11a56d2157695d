#include "common/plan_cuda.h"

#include <algorithm>
#include <initializer_list>

namespace resona {
namespace {

constexpr int64_t kPoolRestPerBlock = 128;
constexpr int64_t kIndexCountBytes = 2 << 20;   // what the counts of the quick index may take
constexpr int64_t kIndexReadBytes = 128 << 20;  // and its blocks read of them: some 25 us of an H200's L2
constexpr int64_t kIndexNextBytes = 64 << 10;   // of shared memory, for where each list goes on
constexpr int64_t kMostSlots = (int64_t{1} << 31) - 1;  // positions of an index are signed 32-bit
constexpr int64_t kMostKeys = (int64_t{1} << 32) - 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* data, std::initializer_list<int64_t> elements, DType dtype) {
  bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t count : elements) all = all && count * size_of(dtype) % 16 == 0;
  return all;
}

int64_t slots_of(const Shape& s) {
  return saturated_product({s.batch, s.queries, s.retrieval_heads, s.top_k});
}
int64_t keys_of(const Shape& s) {
  return saturated_product({s.batch, s.retrieval_heads, s.context / s.chunk_size});
}

// The fewest lanes that hold a row; rows of more than 256 elements come in slices.
int64_t lanes_for(int64_t dim) {
  for (const int64_t lanes : {8, 16})
    if (dim <= kElementsPerLane * lanes) return lanes;
  return 32;
}

// A list is summed by several warps if it is longer than the smallest power of two, at least 64, whose square
// reaches the number of queries; so the chunk that all of them select costs two chains of about its root.
int64_t segment_for(int64_t queries) {
  int64_t segment = 64;
  while (segment * segment < queries) segment *= 2;
  return segment;
}

CudaRetrieveBackwardPlan plan_retrieve_backward_part(const Shape& whole, int64_t batch,
                                                     const CudaFacts& facts, const CudaDevice& device) {
  Shape s = whole;
  s.batch = batch;
  CudaRetrieveBackwardPlan plan;
  plan.kernel = "gather_segments";
  plan.reason = batch < whole.batch ? "lists in fixed segments, some batch entries at a time to bound scratch"
                                    : "lists in fixed segments: one owner and one order for every sum";
  plan.batch = batch;
  plan.lanes = lanes_for(s.retrieval_dim);
  plan.vector = facts.vector_rows;
  plan.sequences = facts.sequences;
  plan.index = plan_index_cuda(s, device);
  plan.segment = segment_for(s.queries);
  plan.partial_rows = 2 * ceil_div(plan.index.slots, plan.segment);
  const int64_t slices = ceil_div(s.retrieval_dim, kElementsPerLane * plan.lanes);
  const int64_t rows_per_block = kRetrieveBackwardThreads / plan.lanes, warps = kRetrieveBackwardThreads / 32;
  const int64_t most = device.tuning.retrieve_backward_blocks * device.sms;
  const int64_t rows = saturated_product({s.batch, s.queries, s.retrieval_heads});
  const int64_t segments =
      std::min(ceil_div(plan.index.slots, plan.segment) + plan.index.keys, plan.index.slots);
  plan.query_blocks = std::min(ceil_div(rows, rows_per_block), most);
  plan.segment_blocks = std::min(ceil_div(saturated_product({segments, slices}), warps), most);
  plan.chunk_blocks = std::min(ceil_div(saturated_product({plan.index.keys, slices}), rows_per_block), most);
  s.batch = whole.batch == 0 ? 0 : (whole.batch - 1) % batch + 1;
  plan.last_index = plan_index_cuda(s, device);
  Workspace counting;
  take_retrieve_backward(plan, whole, counting);
  plan.workspace_bytes =
      counting.bytes() + std::max(plan.index.workspace_bytes, plan.last_index.workspace_bytes);
  return plan;
}

}  // namespace

int64_t saturated_product(std::initializer_list<int64_t> factors) {
  constexpr int64_t kMost = int64_t{1} << 50;
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (factor == 0) return 0;
    result = result > kMost / factor ? kMost : result * factor;
  }
  return result;
}

// Shared memory as the CUDA programming guide lists it: 163 KiB for 8.0 and 8.7, 227 KiB for 9.x and 10.x, 99
// KiB for what is made for desktops.
CudaDevice typical_cuda_device(int64_t capability, int64_t sms) {
  const int64_t generation = capability / 10;
  int64_t kib = 99;
  if (capability == 80 || capability == 87) kib = 163;
  if (generation == 9 || generation == 10 || generation == 11) kib = 227;
  return {sms, capability, kib << 10};
}

bool rows_of_16_bytes(const Rows& r, int64_t dim) {
  return aligned(r.data, {r.batch_stride, r.token_stride, r.head_stride, dim}, r.dtype);
}

bool rows_of_16_bytes(const MutableRows& r, int64_t dim) {
  return aligned(r.data, {r.batch_stride, r.token_stride, r.head_stride, dim}, r.dtype);
}

CudaFacts cuda_facts(bool vector_rows, const DeviceSequences& packed) {
  return {vector_rows, packed.cu_seqlens == nullptr ? CudaFacts::kNotPacked : packed.count};
}

int32_t* take_chunk_begin(int64_t sequences, Workspace& workspace) {
  return sequences == CudaFacts::kNotPacked ? nullptr : workspace.take<int32_t>(sequences + 1);
}

CudaPoolPlan plan_pool_cuda(const Shape& s, const CudaFacts& facts, const CudaDevice& device) {
  CudaPoolPlan plan;
  plan.kernel = "warp_rows";
  plan.vector = facts.vector_rows;
  plan.lanes = plan.vector ? lanes_for(s.retrieval_dim) : 32;
  plan.reason = plan.vector ? "one pass over the context with 16-byte loads, as few lanes per row as hold it"
                            : "one pass over the context by single elements: rows not multiples of 16 bytes";
  const int64_t rows = saturated_product({s.batch, s.context / s.chunk_size, s.retrieval_heads});
  plan.blocks = std::min(ceil_div(rows, kPoolRowsPerBlock), device.tuning.pool_blocks * device.sms);
  plan.sequences = facts.sequences;
  Workspace counting;
  take_chunk_begin(plan.sequences, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

CudaPoolPlan plan_pool_backward_cuda(const Shape& s, const CudaFacts& facts, const CudaDevice& device) {
  CudaPoolPlan plan = plan_pool_cuda(s, facts, device);
  plan.kernel = "warp_rows_backward";
  // Tokens in no chunk get zeros, a warp for 32 of them; packed ones have to be found among all.
  const bool packed = facts.sequences != CudaFacts::kNotPacked;
  const int64_t rest = saturated_product({s.batch, packed ? s.context : s.context % s.chunk_size});
  const int64_t rest_blocks =
      std::min(ceil_div(rest, kPoolRestPerBlock), device.tuning.pool_blocks * device.sms);
  plan.blocks = std::max(plan.blocks, rest_blocks);
  return plan;
}

CudaIndexPlan plan_index_sort_cuda(const Shape& s, const CudaDevice& device) {
  CudaIndexPlan plan{};
  plan.kernel = "counting_sort";
  plan.slots = slots_of(s), plan.keys = keys_of(s);
  int64_t bits = 1;
  while (plan.keys >> bits) ++bits;
  plan.passes = ceil_div(bits, kIndexDigitBits);
  plan.digit_bits = ceil_div(bits, plan.passes);
  plan.reason = plan.passes == 1
                    ? "stable counting sort of the slots by chunk in one pass"
                    : "stable counting sort of the slots by chunk, a pass per digit of the chunk";
  plan.slot_blocks = std::min(ceil_div(plan.slots, kIndexThreads), device.tuning.index_blocks * device.sms);
  plan.key_blocks = std::min(ceil_div(plan.keys + 1, kIndexThreads), device.tuning.index_blocks * device.sms);
  plan.tiles = ceil_div(plan.slots, kIndexTile);
  Workspace counting;
  take_index(plan, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

CudaIndexPlan plan_index_cuda(const Shape& s, const CudaDevice& device) {
  CudaIndexPlan plan{};
  const int64_t groups = saturated_product({s.batch, s.retrieval_heads});
  const int64_t group_tiles = ceil_div(s.queries, kIndexTileQueries);
  plan.kernel = "counted_tiles";
  plan.reason = "few chunks: tiles of queries are counted, then every slot is placed, in two launches";
  plan.quick = true;
  plan.slots = slots_of(s), plan.keys = keys_of(s);
  plan.query_tiles = saturated_product({groups, group_tiles});
  plan.count_pitch = ceil_div(s.context / s.chunk_size, kIndexCountsPerLoad) * kIndexCountsPerLoad;
  const int64_t padded_keys = saturated_product({std::max<int64_t>(1, groups), plan.count_pitch});
  const int64_t count_bytes = saturated_product({plan.query_tiles, plan.count_pitch, 2});
  if (padded_keys > kIndexMostKeys || count_bytes > kIndexCountBytes || s.top_k > kIndexMostTopK)
    return plan_index_sort_cuda(s, device);
  // A tile per warp; few enough blocks that the counts, which each of them reads, do not become the work.
  const int64_t wanted =
      std::clamp<int64_t>(kIndexReadBytes / 2 / std::max<int64_t>(1, count_bytes), 1, device.sms);
  const int64_t most =
      std::min(kIndexMostBlockTiles, kIndexNextBytes / 4 / std::max(kIndexCountsPerLoad, plan.count_pitch));
  plan.block_tiles = std::clamp<int64_t>(ceil_div(plan.query_tiles, wanted), 1, most);
  plan.blocks = groups * std::max<int64_t>(1, ceil_div(group_tiles, plan.block_tiles));
  if (saturated_product({plan.blocks, count_bytes}) > kIndexReadBytes) return plan_index_sort_cuda(s, device);
  plan.blocks = std::max<int64_t>(1, plan.blocks);
  plan.shared_bytes = 4 * (padded_keys + plan.block_tiles * (plan.count_pitch + kIndexTileQueries));
  Workspace counting;
  take_index(plan, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

int64_t launches_of(const CudaIndexPlan& plan) {
  if (plan.quick) return 2;
  constexpr int64_t kScan = 2, kKeys = 1, kOffsets = 1 + kScan, kLists = 1, kPass = 2 + kScan;
  return kKeys + plan.passes * kPass + kOffsets + kLists;
}

IndexArrays take_index(const CudaIndexPlan& plan, Workspace& workspace) {
  IndexArrays a{};
  a.offsets = workspace.take<uint32_t>(plan.keys + 1);
  a.tile_begin = workspace.take<uint32_t>(plan.keys + 1);
  a.tile_totals = workspace.take<uint32_t>(ceil_div(plan.keys + 1, kScanTile));
  if (plan.quick) {
    a.tile_counts = workspace.take<uint16_t>(plan.query_tiles * plan.count_pitch);
    a.sorted_slots = workspace.take<uint32_t>(plan.slots);
    a.list = workspace.take<uint32_t>(plan.slots);
    a.position = workspace.take<int32_t>(plan.slots);
    return a;
  }
  for (int i = 0; i < 2; ++i) {
    a.keys[i] = workspace.take<uint32_t>(plan.slots);
    a.slots[i] = workspace.take<uint32_t>(plan.slots);
  }
  a.count_entries = plan.tiles << plan.digit_bits;
  a.counts = workspace.take<uint32_t>(a.count_entries);
  a.totals = workspace.take<uint32_t>(ceil_div(a.count_entries, kScanTile));
  // The last pass leaves its input free.
  const int64_t last = plan.passes % 2;
  a.sorted_slots = a.slots[last];
  a.position = reinterpret_cast<int32_t*>(a.keys[1 - last]);
  a.list = a.slots[1 - last];
  return a;
}

CudaRetrieveBackwardPlan plan_retrieve_backward_cuda(const Shape& s, const CudaFacts& facts,
                                                     const CudaDevice& device) {
  const auto fits = [&](int64_t batch) {
    const CudaRetrieveBackwardPlan plan = plan_retrieve_backward_part(s, batch, facts, device);
    return plan.index.slots <= kMostSlots && plan.index.keys <= kMostKeys &&
           plan.workspace_bytes <= kCudaWorkspaceBytes;
  };
  const int64_t batch = largest_that_fits(std::max<int64_t>(1, s.batch), fits);
  return plan_retrieve_backward_part(s, batch, facts, device);
}

RetrieveBackwardArrays take_retrieve_backward(const CudaRetrieveBackwardPlan& plan, const Shape& s,
                                              Workspace& workspace) {
  RetrieveBackwardArrays a;
  a.chunk_begin = take_chunk_begin(plan.sequences, workspace);
  a.factors = workspace.take<float>(plan.index.slots);
  a.partials = workspace.take<float>(saturated_product({plan.partial_rows, ceil_div(s.retrieval_dim, 8), 8}));
  return a;
}

}  // namespace resona
