#include "common/plan_decode_cuda.h"

#include <algorithm>
#include <limits>

namespace resona {
namespace {

constexpr int64_t kWarps = kDecodeThreads / 32;
constexpr int64_t kSlotBytes = 64 << 20;  // of slots that shared memory cannot hold, of further splits

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many rows as a block stages at once, and more where that would make more blocks than are needed: each
// range costs the next kernel k keys to read.
CudaDecodeRanges cut(int64_t rows, int64_t wanted, int64_t groups, DType dtype, const CudaDevice& device) {
  const int64_t tile = size_of(dtype) == 2 ? 128 : 64;
  const int64_t blocks =
      std::max<int64_t>(1, device.tuning.decode_blocks * device.sms / std::max<int64_t>(1, groups));
  CudaDecodeRanges r{};
  r.range = std::clamp(ceil_div(ceil_div(rows, blocks), tile) * tile, tile, kDecodeMostRange);
  r.lists = ceil_div(rows, r.range);
  // Choosing k of a range takes k rounds of the block; for many of few it is quicker to pass all on.
  r.kept = wanted <= r.range / 4 ? wanted : r.range;
  return r;
}

void plan_search(CudaDecodePlan& plan, const Shape& s, const CudaDecodeFacts& f, const CudaDevice& device) {
  const int64_t chunks = s.context / s.chunk_size, groups = saturated_product({s.batch, s.retrieval_heads});
  const int64_t superchunks = f.superchunk_size > 0 ? chunks / f.superchunk_size : 0;
  const auto ranges = [&](int64_t rows, int64_t wanted) {
    return cut(rows, wanted, groups, f.embedding_dtype, device);
  };
  plan.vector_chunks = f.vector_chunks;
  plan.probes = superchunks > f.probes;
  plan.superchunk_size = plan.probes ? f.superchunk_size : 1;
  plan.probed = plan.probes ? f.probes : std::numeric_limits<int64_t>::max();
  if (!plan.probes) {
    plan.chunks = ranges(chunks, s.top_k);
    plan.search_blocks = s.batch + saturated_product({groups, plan.chunks.lists});
    return;
  }
  // The open superchunk lacks a chunk.
  const int64_t searched = std::min(chunks, saturated_product({f.probes + 1, f.superchunk_size}) - 1);
  plan.centroids = ranges(superchunks, f.probes);
  plan.chunks = ranges(searched, s.top_k);
  plan.search_blocks = s.batch + saturated_product({groups, plan.centroids.lists});
  plan.refine_blocks = saturated_product({groups, plan.chunks.lists});
}

void choose_instance(CudaDecodePlan& plan, const Shape& s, const CudaDecodeFacts& f) {
  const int64_t group = s.heads / s.kv_heads;
  plan.vector_rows = f.vector_rows;
  plan.tensor_cores = f.vector_rows && size_of(f.dtype) == 2;
  if (plan.tensor_cores) {
    plan.dim = s.head_dim <= 64 ? 64 : s.head_dim <= 128 ? 128 : 256;
    plan.heads = plan.dim == 128 && group > 8 ? 16 : 8;
    return;
  }
  int64_t lanes = !plan.vector_rows || s.head_dim > 128 ? 32 : s.head_dim > 64 ? 16 : 8;
  plan.heads = plan.vector_rows && group >= 4 ? 4 : 1;
  if (plan.heads == 4) lanes = std::max<int64_t>(16, lanes);
  plan.dim = kElementsPerLane * lanes;
}

// Keys that the teams of a block take at a time.
int64_t keys_per_block(const CudaDecodePlan& plan) {
  if (plan.tensor_cores) return kWarps * 16;
  return kDecodeThreads / (plan.dim / kElementsPerLane) * 4;
}

void plan_attention(CudaDecodePlan& plan, const Shape& s, const CudaDecodeFacts& f,
                    const CudaDevice& device) {
  choose_instance(plan, s, f);
  plan.rows = saturated_product({s.batch, s.kv_heads, ceil_div(s.heads / s.kv_heads, plan.heads)});
  plan.slots = std::min(s.top_k, s.context / s.chunk_size);
  plan.shared_slots = plan.slots <= kDecodeSharedSlots;
  const int64_t keys = saturated_product({plan.slots, s.chunk_size});
  const int64_t wanted = ceil_div(device.tuning.decode_blocks * device.sms, std::max<int64_t>(1, plan.rows));
  plan.splits = std::clamp<int64_t>(std::min(wanted, ceil_div(keys, keys_per_block(plan))), 1, wanted);
  if (!plan.shared_slots)
    plan.splits = std::clamp<int64_t>(
        kSlotBytes / std::max<int64_t>(1, saturated_product({8, plan.rows, plan.slots})), 1, plan.splits);
}

}  // namespace

int64_t decode_partial_floats(const CudaDecodePlan& plan) {
  // Output rows per lane, elements of a row per lane, lanes of a team.
  if (plan.tensor_cores) return plan.heads / 4 * (plan.dim / 8 + 2) * 32;
  return plan.heads * (kElementsPerLane + 2) * (plan.dim / kElementsPerLane);
}

CudaDecodePlan plan_decode_cuda(const Shape& s, const CudaDecodeFacts& f, const CudaDevice& device) {
  CudaDecodePlan plan{};
  plan_search(plan, s, f, device);
  plan_attention(plan, s, f, device);
  plan.kernel = plan.tensor_cores ? "decode_mma" : "decode_lanes";
  plan.reason = plan.tensor_cores
                    ? "ranges of chunks scored canonically; heads of a group side by side on tensor cores"
                    : "ranges of chunks scored canonically; float32, or rows off 16-byte borders, in lanes";
  if (plan.probes)
    plan.reason = plan.tensor_cores ? "centroids first, then the chunks of the best; heads on tensor cores"
                                    : "centroids first, then the chunks of the best; heads in lanes";
  Workspace counting;
  take_decode(plan, s, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

DecodeArrays take_decode(const CudaDecodePlan& plan, const Shape& s, Workspace& workspace) {
  DecodeArrays a{};
  a.positions = workspace.take<int32_t>(s.batch);
  a.tickets = workspace.take<uint32_t>(plan.rows);
  const auto take_keys = [&](const CudaDecodeRanges& r) {
    return workspace.take<uint64_t>(saturated_product({s.batch, s.retrieval_heads, r.lists, r.kept}));
  };
  if (plan.probes) a.centroid_keys = take_keys(plan.centroids);
  a.keys = take_keys(plan.chunks);
  if (plan.splits > 1)
    a.partials =
        workspace.take<float>(saturated_product({plan.attend_blocks(), decode_partial_floats(plan)}));
  if (!plan.shared_slots)
    a.slots = workspace.take<int32_t>(saturated_product({plan.attend_blocks(), 2, plan.slots}));
  return a;
}

}  // namespace resona
