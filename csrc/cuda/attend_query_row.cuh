// What the query-stationary kernels share: the keys that a row reads, its softmax in progress, and its end.
//
// Logits are natural, not in units of log 2: a bias near the end of float32's range must not overflow.
#pragma once

#include "cuda/attend_params.cuh"
#include "cuda/attend_tile.cuh"

namespace resona::cuda {

// What exponents are taken against; with -inf, the peak of no keys at all, there would be -inf - -inf.
__device__ __forceinline__ float safe_peak(float peak) { return peak == -kInfinity ? 0.0f : peak; }

// One query and some of the heads that share a key/value head, hence a selection and every load.
struct QueryRow {
  int batch, query, kv_head;
  int head, heads;  // the first query head and their number, 0: no such row
};

template <class T>
__device__ __forceinline__ int64_t query_rows(const AttendParams<T>& p, int heads_at_once) {
  return p.batch * p.queries * p.kv_heads * ((p.group() + heads_at_once - 1) / heads_at_once);
}

// Heads innermost: rows that run side by side read the same tokens, which lie together in memory.
template <class T>
__device__ __forceinline__ QueryRow query_row(const AttendParams<T>& p, int64_t i, int heads_at_once) {
  if (i >= query_rows(p, heads_at_once)) return {0, 0, 0, 0, 0};
  const int group = p.group(), parts = (group + heads_at_once - 1) / heads_at_once;
  const int first = static_cast<int>(i % parts) * heads_at_once, left = group - first;
  const int64_t pair = i / parts, token = pair / p.kv_heads;
  const int kv_head = static_cast<int>(pair % p.kv_heads);
  return {static_cast<int>(token / p.queries), static_cast<int>(token % p.queries), kv_head,
          kv_head * group + first, left < heads_at_once ? left : heads_at_once};
}

struct QueryKey {
  int token;   // in the context, -1: none
  float bias;  // added to the logit
};

// The k S keys of a row's slots as one list, of which a lane takes every `step`-th; k is below 2^31.
struct QueryKeys {
  const int32_t* indices;  // of all slots; the row's begin at first_slot
  const float* bias;       // null: none
  int64_t first_slot;
  float bias_scale;
  int slot, slots;
  int token_begin, eligible;
  uint32_t chunk_size, offset;      // S; the key's place in the chunk of the slot
  uint32_t slot_step, offset_step;  // step / S, step % S

  __device__ __forceinline__ bool more() const { return slot < slots && eligible > 0; }

  __device__ __forceinline__ QueryKey next() {
    QueryKey key{-1, 0};
    if (more()) {
      const int index = indices[first_slot + slot];
      if (index >= 0 && index < eligible) {  // wrong indices count as unused
        key.token = token_begin + index * static_cast<int>(chunk_size) + static_cast<int>(offset);
        if (bias) key.bias = bias[first_slot + slot] * bias_scale;
        if (key.bias == -kInfinity) key.token = -1;
      }
    }
    slot += slot_step, offset += offset_step;
    if (offset >= chunk_size) offset -= chunk_size, ++slot;
    return key;
  }
};

// From key number `first` on.
__device__ __forceinline__ void start_at(QueryKeys& keys, int64_t chunk_size, uint32_t first, uint32_t step) {
  constexpr int64_t kMost = INT32_MAX;  // longer than any context
  keys.chunk_size = static_cast<uint32_t>(chunk_size < kMost ? chunk_size : kMost);
  keys.slot = static_cast<int>(first / keys.chunk_size), keys.offset = first % keys.chunk_size;
  keys.slot_step = step / keys.chunk_size, keys.offset_step = step % keys.chunk_size;
}

template <class T>
__device__ __forceinline__ QueryKeys query_keys(const AttendParams<T>& p, const QueryRow& row, uint32_t first,
                                                uint32_t step) {
  const QueryPlace place = p.place(row.query);
  const int head = p.retrieval_head(row.kv_head);
  QueryKeys keys;
  keys.indices = p.indices, keys.bias = p.bias;
  keys.first_slot = ((row.batch * p.queries + row.query) * p.retrieval_heads + head) * p.top_k;
  keys.bias_scale = p.bias_scale ? p.bias_scale[head] : 1.0f;
  keys.token_begin = static_cast<int>(place.token_begin);
  keys.eligible = row.heads > 0 ? static_cast<int>(place.eligible) : 0;
  keys.slots = static_cast<int>(p.top_k);
  start_at(keys, p.chunk_size, first, step);
  return keys;
}

// Softmax in progress of kRows heads. Of each, the lanes of a team hold kValues elements of the output, the
// same peak, and totals that are yet to be added up.
template <int kRows, int kValues>
struct QueryPartial {
  static constexpr int kFloats = kRows * (kValues + 2);
  float peak[kRows], total[kRows], value[kRows][kValues];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      peak[r] = -kInfinity, total[r] = 0;
#pragma unroll
      for (int i = 0; i < kValues; ++i) value[r][i] = 0;
    }
  }

  __device__ __forceinline__ void store(float* to, int stride) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r, to += (kValues + 2) * stride) {
      to[0] = peak[r], to[stride] = total[r];
#pragma unroll
      for (int i = 0; i < kValues; ++i) to[(i + 2) * stride] = value[r][i];
    }
  }

  __device__ __forceinline__ void add(const float* other, int stride) {
#pragma unroll
    for (int r = 0; r < kRows; ++r, other += (kValues + 2) * stride) {
      const float above = fmaxf(peak[r], other[0]), reference = safe_peak(above);
      const float own = exp_of(peak[r] - reference), theirs = exp_of(other[0] - reference);
      peak[r] = above, total[r] = total[r] * own + other[stride] * theirs;
#pragma unroll
      for (int i = 0; i < kValues; ++i) value[r][i] = value[r][i] * own + other[(i + 2) * stride] * theirs;
    }
  }
};

// Adds up the partial results of `splits` teams of kLanes lanes, which lie side by side in the block: into
// the first one, in ascending order. All threads of the block take part. The others pass on kFloats each, in
// columns of dynamic shared memory: of all threads but one team's at most.
template <int kThreads, int kLanes, class Partial>
__device__ __forceinline__ void merge_splits(Partial& partial, int splits) {
  constexpr int kColumns = kThreads - kLanes;
  RESONA_DYNAMIC_SHARED(memory);
  const int thread = threadIdx.x, rows_before = thread / (kLanes * splits);
  const bool first = thread / kLanes % splits == 0;
  float* column = reinterpret_cast<float*>(memory) + thread - rows_before * kLanes;  // of the team behind
  if (!first) partial.store(column - kLanes, kColumns);
  __syncthreads();
  if (first)
    for (int s = 1; s < splits; ++s) partial.add(column + (s - 1) * kLanes, kColumns);
  __syncthreads();  // read before the next rows replace them
}

template <class T>
__device__ __forceinline__ RowEnd end_of_query(const AttendParams<T>& p, int head, float peak, float total) {
  return end_with_sink(peak, total, p.sink ? p.sink[head] : -kInfinity);
}

}  // namespace resona::cuda
