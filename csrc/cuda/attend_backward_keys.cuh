// Gradients of attention, token by token: d K and d V where attend_backward.cuh has not written them itself.
//
//   attend_key_gradient_kernel      slabs of the segments of its list, in order; else zeros    lanes: a token
//   attend_clear_kernel             zeros, for the first of several ranges of queries
//
// Bytes per token and key/value head: 4 D written, 8 D read per segment of a list of several. Where
// cu_seqlens is right, every element of the gradients has one writer.
#pragma once

#include "cuda/attend_backward_rows.cuh"

namespace resona::cuda {

struct AttendKeyGradientConfig {
  static constexpr int kThreads = AttendBackwardRowConfig::kThreads;
  static constexpr int kRegisterCap = 128;
};

// The chunk row that holds a token and its place in it; a negative row if no chunk does.
struct TokenPlace {
  int64_t chunk, within;
};

template <class T>
__device__ __forceinline__ TokenPlace place_of_token(const AttendParams<T>& a, int64_t token) {
  if (!a.packed.cu_seqlens) return {token / a.chunk_size, token % a.chunk_size};
  const QueryPlace place = a.place(token);  // packed: queries are the tokens
  if (token < place.token_begin) return {-1, 0};
  const int64_t row = place.chunk_begin + (token - place.token_begin) / a.chunk_size;
  // The row that would hold the token, were its sequence to have it; else the row is another's.
  const int64_t first = first_token_of_chunk(a.packed, row, a.context, a.chunk_size);
  const bool inside = first >= 0 && first <= token && token - first < a.chunk_size;
  return {inside && row < a.chunks ? row : -1, token - first};
}

// The list that a token's chunk has: where it begins, and its segments.
struct TokenList {
  int64_t begin, segments, within;
};

template <class T>
__device__ __forceinline__ TokenList list_of_token(const AttendBackwardParams<T>& p, int64_t batch,
                                                   int64_t token, int64_t retrieval_head) {
  const AttendParams<T>& a = p.attend;
  const TokenPlace place = place_of_token(a, token);
  if (place.chunk < 0 || place.chunk >= a.chunks) return {0, 0, 0};
  const int64_t key = (batch * a.retrieval_heads + retrieval_head) * a.chunks + place.chunk;
  const int64_t begin = p.offsets[key], rows = (p.offsets[key + 1] - begin) * a.group();
  return {begin, (rows + p.segment - 1) / p.segment, place.within};
}

template <class T>
__device__ __forceinline__ void write_token(const AttendBackwardParams<T>& p, int64_t batch_token, int row,
                                            int first) {
  const AttendParams<T>& a = p.attend;
  const int kv = row % p.heads, retrieval_head = row / p.heads;
  const int64_t batch = batch_token / a.context, token = batch_token - batch * a.context;
  const TokenList list = list_of_token(p, batch, token, retrieval_head);
  // The only segment of a list has written its sums itself.
  if (p.carried ? list.segments <= 1 && !p.last_range : list.segments == 1) return;
  const int pitch = partial_pitch(a.head_dim);
  const int64_t kv_head = retrieval_head * p.heads_of_list() + p.first_head + kv;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    float* carried =
        p.carried ? p.carried + (p.carried_row(token, retrieval_head, kv) * 2 + which) * pitch : nullptr;
    RowPart sum;
    sum.clear();
    if (carried) sum.load(carried, first, pitch, true);
    for (int64_t i = 0; list.segments > 1 && i < list.segments; ++i) {
      const int64_t slab = p.slab_row(kv, list.begin, i) * 2 + which;
      RowPart part;
      part.load(p.slab + (slab * a.chunk_size + list.within) * pitch, first, pitch, true);
      sum.add(part);
    }
    const HeadRows<T>& gradient = which ? p.value_gradient : p.key_gradient;
    if (!carried || p.last_range)
      sum.store(gradient.at(batch, token, kv_head), first, a.head_dim, a.vector, 1);
    else
      sum.store(carried, first, pitch, true, 1);
  }
}

template <class T>
__global__ void __launch_bounds__(AttendKeyGradientConfig::kThreads)
    attend_key_gradient_kernel(AttendBackwardParams<T> p) {
  const AttendParams<T>& a = p.attend;
  ptx::griddepcontrol_wait();
  for_rows(a.batch * a.context, a.retrieval_heads * p.heads, a.head_dim,
           [&](const RowWalk& at, bool exists, int first, int) {
             if (exists) write_token(p, at.query, at.at, first);
           });
  ptx::griddepcontrol_launch_dependents();
}

struct AttendClearParams {
  float* carried;
  int64_t count;  // a multiple of four
};

static __global__ void __launch_bounds__(AttendKeyGradientConfig::kThreads)
    attend_clear_kernel(AttendClearParams p) {
  ptx::griddepcontrol_wait();
  for (int64_t i = 4 * thread_of_grid(); i < p.count; i += 4 * threads_of_grid())
    store_four(p.carried + i, make_float4(0, 0, 0, 0));
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
