// What attend_chunk.cuh is asked to do, and how a block finds its part of it.
#pragma once

#include "cuda/attend_params.cuh"
#include "cuda/device.cuh"
#include "cuda/index.cuh"

namespace resona::cuda {

// Where rows go: normalised partial results in fp32, or in fp16 with a factor per row (T of 16 bits), or the
// final ones.
enum class AttendResult { kPartialFloat, kPartialHalf, kFinal };

template <class T>
struct AttendChunkParams {
  AttendParams<T> attend;
  const uint32_t* list;         // [slots]: the index, see index.cuh
  const int32_t* position;      // [slots]
  const uint32_t* offsets;      // [keys + 1]
  const uint32_t* tile_begin;   // [keys + 1]: cut at item_rows
  const uint32_t* tile_totals;  // of its scan
  void* partial;                // [kv_count, slots, G, partial_pitch(D)], fp32 or fp16
  float* partial_lse;           // [kv_count, slots, G]
  float* partial_scale;         // [kv_count, slots, G], of fp16
  int64_t slots, keys;          // B T R k, B R C
  int kv_count;                 // the first so many of the Hkv / R key/value heads of each list; final: all
  AttendResult result;
  int item_rows;            // at most AttendChunkConfig::kMostItemRows
  int key_rows, key_slots;  // rows of a slot: min(S, kKeys of the config) rounded up to 16; slots: 1 or 2
  bool ahead;               // load the next step under the work on this one; with S > kKeys, takes 2 slots

  __device__ __forceinline__ int64_t partial_row(int64_t kv_in_list, int64_t at) const {
    return (kv_in_list * slots + at) * attend.group();
  }
};

// Rows of partial results are whole 16-byte pieces.
__device__ __forceinline__ int partial_pitch(int head_dim) { return (head_dim + 7) / 8 * 8; }

// ---- items

// x / G by multiplication, right for x < 2^16 and G < 2^15: a division per row of Q would be felt.
struct GroupDivision {
  uint64_t inverse;
  int group;

  __device__ __forceinline__ int quotient(int x) const { return static_cast<int>(x * inverse >> 32); }
  __device__ __forceinline__ int remainder(int x) const { return x - quotient(x) * group; }
};

__device__ __forceinline__ GroupDivision division_by(int group) {
  return {((1ull << 32) + group - 1) / group, group};
}

// Lives in shared memory: its registers are needed for the accumulators.
struct ChunkItem {
  int64_t batch, retrieval_head, kv_head;
  int64_t token;        // the chunk's first
  int64_t list;         // the item's first query
  int64_t partial_row;  // the item's first row
  int skipped;          // rows of the first query that belong to the item before
  int rows;
  GroupDivision group;
};

// find_work of index.cuh by a warp: 32 probes a step, so 64K keys take four loads in turn, not 16.
__device__ __forceinline__ WorkItem find_work_by_warp(const uint32_t* tile_begin, const uint32_t* totals,
                                                      int64_t keys, uint32_t tile) {
  int64_t low = 0, high = keys;
  while (low + 1 < high) {
    const int64_t step = (high - low + kWarpSize - 1) / kWarpSize;
    const int64_t probe = low + threadIdx.x % kWarpSize * step;
    const bool before = probe < high && scanned(tile_begin, totals, probe) <= tile;
    low += (kWarpSize - 1 - __clz(static_cast<int>(__ballot_sync(kAllLanes, before)))) * step;
    high = low + step < high ? low + step : high;
  }
  return {low, scanned(tile_begin, totals, low)};
}

// Wrong cu_seqlens may name any token; the chunk lies within the context all the same.
template <class T>
__device__ __forceinline__ int64_t first_token(const AttendParams<T>& a, int64_t chunk) {
  if (!a.packed.cu_seqlens) return chunk * a.chunk_size;
  const int64_t token = first_token_of_chunk(a.packed, chunk, a.context, a.chunk_size);
  return clamp_token(token, a.context - a.chunk_size);
}

template <class T>
__device__ __forceinline__ ChunkItem find_item(const AttendChunkParams<T>& p, int64_t tiles, int64_t number) {
  const AttendParams<T>& a = p.attend;
  const int64_t kv_in_list = number / tiles;
  const uint32_t tile = static_cast<uint32_t>(number - kv_in_list * tiles);
  const WorkItem work = find_work_by_warp(p.tile_begin, p.tile_totals, p.keys, tile);
  const int64_t batch_and_head = work.key / a.chunks, head = batch_and_head % a.retrieval_heads;
  const int64_t begin = p.offsets[work.key], end = p.offsets[work.key + 1], group = a.group();
  const int64_t first = static_cast<int64_t>(tile - work.begin) * p.item_rows;
  const int64_t rows = (end - begin) * group - first;
  ChunkItem item;
  item.batch = batch_and_head / a.retrieval_heads;
  item.retrieval_head = head;
  item.kv_head = head * (a.kv_heads / a.retrieval_heads) + kv_in_list;
  item.token = first_token(a, work.key % a.chunks);
  item.list = begin + first / group;
  item.partial_row = p.partial_row(kv_in_list, begin) + first;
  item.skipped = static_cast<int>(first % group);
  item.rows = static_cast<int>(rows < p.item_rows ? rows : p.item_rows);
  item.group = division_by(a.group());
  return item;
}

}  // namespace resona::cuda
