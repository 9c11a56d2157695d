// What every attention kernel is asked to do. Tensors are head-last with a contiguous last dimension; the
// other strides are free, in elements.
#pragma once

#include "cuda/device.cuh"
#include "cuda/sequences.cuh"

namespace resona::cuda {

template <class T>
struct HeadRows {
  T* data;
  int64_t batch_stride, token_stride, head_stride;

  __device__ __forceinline__ T* at(int64_t batch, int64_t token, int64_t head) const {
    return data + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

template <class T>
struct AttendParams {
  HeadRows<const T> query;               // [B, T, H, D]
  HeadRows<const T> key, value;          // [B, L, Hkv, D]
  const int32_t* indices;                // [B, T, R, k]
  const float* bias;                     // [B, T, R, k], null: none. Added to the logits of a slot's chunk
  const float* bias_scale;               // [R], null: 1
  const float* sink;                     // [H], null: none
  T* out;                                // [B, T, H, D], contiguous
  float* lse;                            // [B, T, H], natural logarithm
  int64_t batch, queries, context;       // B, T, L
  int64_t chunk_size, chunks, top_k;     // S, C, k
  int heads, kv_heads, retrieval_heads;  // H, Hkv, R
  int head_dim;                          // D
  float scale;                           // of <query, key>
  bool vector;             // rows of all tensors lie on 16-byte borders and are multiples of them
  PackedSequences packed;  // B == 1 if there are any

  __device__ __forceinline__ int group() const { return heads / kv_heads; }
  __device__ __forceinline__ int retrieval_head(int kv_head) const {
    return kv_head / (kv_heads / retrieval_heads);
  }
  __device__ __forceinline__ QueryPlace place(int64_t token) const {
    return place_of_query(packed, token, queries, context, chunk_size, chunks);
  }
};

}  // namespace resona::cuda
