// What the kernels of the gradients of attention share: the problem, the index, the scratch between them.
//
// Partial results stand at list positions: row (kv, p, g) belongs to position p of the index, key/value head
// kv of this launch and query head g of its group. A segment is a fixed stretch of a list, the work of one
// block; tile_begin of the index counts segments.
#pragma once

#include "cuda/attend_chunk.cuh"
#include "cuda/attend_chunk_item.cuh"
#include "cuda/attend_params.cuh"
#include "cuda/index.cuh"

namespace resona::cuda {

template <class T>
struct AttendBackwardParams {
  AttendParams<T> attend;          // of a part of the problem; `out` is not used
  HeadRows<const T> out;           // [B, T, H, D]
  HeadRows<const T> out_gradient;  // [B, T, H, D]
  const float* lse_gradient;       // [B, T, H], null: zero
  HeadRows<T> query_gradient;      // [B, T, H, D]
  HeadRows<T> key_gradient;        // [B, L, Hkv, D]
  HeadRows<T> value_gradient;      // [B, L, Hkv, D]
  float* bias_gradient;            // [B, T, R, k], null: not wanted

  // Scratch, one number per row of the output.
  float* delta;   // [B, T, H]: <d out, out> - d lse
  float* factor;  // [B, T, H]: 1 / sum of the recomputed weights, null: 1

  // By index.cuh, with rows_per_query = G and tile_rows = segment.
  const uint32_t* list;         // [slots]
  const uint32_t* list_slots;   // [slots]: slot of each position
  const int32_t* position;      // [slots]
  const uint32_t* offsets;      // [keys + 1]
  const uint32_t* tile_begin;   // [keys + 1]
  const uint32_t* tile_totals;  // of its scan
  int64_t slots, keys;          // B T R k, B R C of the index

  // Partial results.
  float* query_partial;  // [heads, slots, G, partial_pitch(D)]: d logit K; null: k = 1, one tile of keys
  float* row_sums;       // [heads, slots, G]: sums over the chunk of weights, then of d logit
  float* slab;           // [heads, slab_rows, 2, S, partial_pitch(D)]: d K and d V of each segment
  float* carried;  // [L, R, heads, 2, partial_pitch(D)]: of the ranges of queries so far, null: one range
  int64_t slab_rows;
  int first_head, heads;  // of the key/value heads of a list, those of this launch
  int segment;            // rows
  bool last_range;
  bool only_sums;  // the pass that finds `factor`

  __device__ __forceinline__ int heads_of_list() const { return attend.kv_heads / attend.retrieval_heads; }
  __device__ __forceinline__ int64_t partial_row(int64_t kv, int64_t position) const {
    return (kv * slots + position) * attend.group();
  }
  __device__ __forceinline__ int64_t slab_row(int64_t kv, int64_t list_begin, int64_t segment_of_list) const {
    const int64_t begin = list_begin * attend.group() / segment + segment_of_list;
    return kv * slab_rows + 2 * begin + (segment_of_list == 0);
  }
  // Row of `carried`, of one batch entry.
  __device__ __forceinline__ int64_t carried_row(int64_t token, int64_t retrieval_head, int64_t kv) const {
    return (token * attend.retrieval_heads + retrieval_head) * heads + kv;
  }
  __device__ __forceinline__ int64_t segments() const {
    return keys > 0 ? work_items(tile_begin, tile_totals, keys) : 0;
  }
};

// ---- items

// Lives in shared memory: its registers are needed for the accumulators.
struct BackwardItem {
  int64_t batch, retrieval_head, kv_head;
  int64_t token;        // the chunk's first
  int64_t list;         // the item's first position
  int64_t partial_row;  // the item's first row
  int64_t slab;         // the segment's row there, or -1: the only one of its list
  int64_t kv;           // of this launch
  int skipped;          // rows of the first query that belong to the item before
  int rows;
  GroupDivision group;
  int zero;
};

// Segment `segment` of all lists, which `work` says is of list work.key.
template <class T>
__device__ __forceinline__ BackwardItem backward_item(const AttendBackwardParams<T>& p, int64_t kv,
                                                      uint32_t segment, const WorkItem& work) {
  const AttendParams<T>& a = p.attend;
  const int64_t batch_and_head = work.key / a.chunks, group = a.group();
  const int64_t begin = p.offsets[work.key], all_rows = (p.offsets[work.key + 1] - begin) * group;
  const int64_t first = static_cast<int64_t>(segment - work.begin) * p.segment, rows = all_rows - first;
  BackwardItem item;
  item.batch = batch_and_head / a.retrieval_heads;
  item.retrieval_head = batch_and_head % a.retrieval_heads;
  item.kv_head = item.retrieval_head * p.heads_of_list() + p.first_head + kv;
  item.token = first_token(a, work.key % a.chunks);
  item.list = begin + first / group;
  item.partial_row = p.partial_row(kv, begin) + first;
  item.kv = kv;
  item.slab = all_rows <= p.segment ? -1 : p.slab_row(kv, begin, segment - work.begin);
  item.skipped = static_cast<int>(first % group);
  item.rows = static_cast<int>(rows < p.segment ? rows : p.segment);
  item.group = division_by(a.group());
  item.zero = 0;
  return item;
}

// By a warp.
template <class T>
__device__ __forceinline__ BackwardItem find_backward_item(const AttendBackwardParams<T>& p, int64_t segments,
                                                           int64_t number) {
  const int64_t kv = number / segments;
  const uint32_t segment = static_cast<uint32_t>(number - kv * segments);
  return backward_item(p, kv, segment, find_work_by_warp(p.tile_begin, p.tile_totals, p.keys, segment));
}

// ---- rows

// A row that does not exist, or has no weight in this chunk, has token -1.
struct RowEntry {
  int32_t token;
  float shift, factor, delta;
};

// The item's row number `row`, of query `query`, which is the item's number `query_of_item`.
template <class T>
__device__ __forceinline__ RowEntry row_entry(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                              int row, int query_of_item, int64_t query) {
  const AttendParams<T>& a = p.attend;
  const int64_t position = item.list + query_of_item;
  const int group_head = item.skipped + row - query_of_item * item.group.group;
  const int64_t of_row = query * a.heads + item.kv_head * item.group.group + group_head;
  const float bias = a.bias ? slot_bias(a, p.list_slots[position], item.retrieval_head) : 0;
  const float lse = a.lse[of_row];
  const bool exists = lse != -kInfinity && bias != -kInfinity;
  return {exists ? static_cast<int32_t>(query - item.batch * a.queries) : -1, bias - lse,
          p.factor && !p.only_sums ? p.factor[of_row] : 1, p.only_sums ? 0 : p.delta[of_row]};
}

}  // namespace resona::cuda
