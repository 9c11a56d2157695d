// What a kernel is asked to do, as plain data. Shapes use the letters of the operator contract: B batch,
// T queries, L context tokens, H query heads, Hkv key/value heads, D head dim, R retrieval heads,
// E retrieval dim, S chunk size, k chunks per query, C = L / S chunks.
#pragma once

#include <cstdint>
#include <vector>

namespace resona {

enum class DType { kFloat32, kFloat16, kBFloat16, kFloat64 };

inline int64_t size_of(DType type) {
  switch (type) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// A head-last tensor [B, tokens, heads, dim] with a contiguous last dimension. Strides in elements.
struct Rows {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
  DType dtype;

  const void* at(int64_t batch, int64_t token, int64_t head) const {
    const int64_t element = batch * batch_stride + token * token_stride + head * head_stride;
    return static_cast<const char*>(data) + element * size_of(dtype);
  }
};

// The same, to be written.
struct MutableRows {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
  DType dtype;

  void* at(int64_t batch, int64_t token, int64_t head) const {
    const int64_t element = batch * batch_stride + token * token_stride + head * head_stride;
    return static_cast<char*>(data) + element * size_of(dtype);
  }
};

// One sequence: a batch entry, or one of several packed into batch entry 0. Its chunk grid begins at
// `token_begin`; its queries stand at the end of its context.
struct Sequence {
  int64_t batch;
  int64_t query_begin, query_count;  // rows of the query tensor
  int64_t token_begin, token_count;  // rows of the key, value and context tensors
  int64_t chunk_begin;               // row of the chunk tensor that holds its chunk 0

  int64_t position(int64_t query) const { return query - query_begin + token_count - query_count; }
};

// Packed sequences as a device sees them. No host reads the values, so a CUDA problem has these and no list
// of Sequence.
struct DeviceSequences {
  const int32_t* cu_seqlens;  // [count + 1] on the device, null: not packed
  int64_t count;
};

struct Shape {
  int64_t batch, queries, context;         // B, T, L
  int64_t heads, kv_heads, head_dim;       // H, Hkv, D
  int64_t retrieval_heads, retrieval_dim;  // R, E
  int64_t chunk_size, top_k;               // S, k
};

struct PoolProblem {
  Shape shape;
  const std::vector<Sequence>* sequences;  // on the CPU
  DeviceSequences packed;                  // on CUDA
  Rows context;                            // [B, L, R, E]
  MutableRows chunks;                      // [B, C, R, E]
};

struct PoolBackwardProblem {
  Shape shape;
  const std::vector<Sequence>* sequences;  // on the CPU
  DeviceSequences packed;                  // on CUDA
  Rows context;                            // [B, L, R, E]
  Rows chunk_gradient;                     // [B, C, R, E]
  MutableRows context_gradient;            // [B, L, R, E], zero on entry to the CPU
};

struct RetrieveProblem {
  Shape shape;
  const std::vector<Sequence>* sequences;  // on the CPU
  DeviceSequences packed;                  // on CUDA
  Rows query;                              // [B, T, R, E]
  Rows chunks;                             // [B, C, R, E]
  int32_t* indices;                        // [B, T, R, k]
  void* scores;                            // [B, T, R, k] float, or double for float64 embeddings
  bool unit_chunks = false;  // the chunks are pool_chunks' own: see kLargestUnitNorm in filter.h
  // On CUDA, to be written if not null: what IndexProblem (cuda/build_index.cuh) calls so.
  uint16_t* tile_counts = nullptr;
  int64_t count_pitch = 0;
};

struct RetrieveBackwardProblem {
  Shape shape;
  const std::vector<Sequence>* sequences;  // on the CPU
  DeviceSequences packed;                  // on CUDA
  Rows query;                              // [B, T, R, E]
  Rows chunks;                             // [B, C, R, E]
  const int32_t* indices;                  // [B, T, R, k]
  const void* score_gradient;              // [B, T, R, k]
  MutableRows query_gradient;              // [B, T, R, E]
  MutableRows chunk_gradient;              // [B, C, R, E], zero on entry to the CPU
};

struct AttendProblem {
  Shape shape;
  const std::vector<Sequence>* sequences;  // on the CPU
  DeviceSequences packed;                  // on CUDA
  Rows query;                              // [B, T, H, D]
  Rows key, value;                         // [B, L, Hkv, D]
  const int32_t* indices;                  // [B, T, R, k]
  const void* bias;                        // [B, T, R, k] of bias_dtype, or null
  DType bias_dtype;                        // float32 or float64
  const void* bias_scale;  // [R] factor of the bias, or null for 1; float, or double for float64 queries
  const void* sink;        // [H], or null; float, or double for float64 queries
  double scale;            // factor of <query, key>
  bool distinct;           // no index occurs twice in a row, as `retrieve` promises
  MutableRows out;         // [B, T, H, D]
  void* lse;               // [B, T, H] float, or double for float64 queries
  const uint16_t* tile_counts = nullptr;  // on CUDA, of the indices, as retrieve wrote them; null: unknown
};

// pool_chunks, retrieve and attend as one call. The chunks live no longer than the call: the backend finds
// room for them (with_chunks), so `chunks` of the first two is empty until then.
struct FusedProblem {
  PoolProblem pool;
  RetrieveProblem retrieve;
  AttendProblem attend;
};

inline int64_t bytes_of_chunks(const Shape& s, DType embedding_dtype) {
  return s.batch * (s.context / s.chunk_size) * s.retrieval_heads * s.retrieval_dim *
         size_of(embedding_dtype);
}

inline FusedProblem with_chunks(FusedProblem p, void* memory) {
  const Shape& s = p.pool.shape;
  const int64_t row = s.retrieval_heads * s.retrieval_dim, batch = s.context / s.chunk_size * row;
  const DType dtype = p.pool.context.dtype;
  p.pool.chunks = {memory, batch, row, s.retrieval_dim, dtype};
  p.retrieve.chunks = {memory, batch, row, s.retrieval_dim, dtype};
  p.retrieve.unit_chunks = true;
  return p;
}

struct AttendBackwardProblem {
  AttendProblem forward;       // `out` and `lse` hold the results of the forward pass
  Rows out_gradient;           // [B, T, H, D]
  const void* lse_gradient;    // [B, T, H], or null
  MutableRows query_gradient;  // [B, T, H, D]
  MutableRows key_gradient;    // [B, L, Hkv, D], zero on entry to the CPU
  MutableRows value_gradient;  // [B, L, Hkv, D], zero on entry to the CPU
  void* bias_gradient;         // [B, T, R, k], or null; of bias_dtype
  void* sink_gradient;         // [H], or null
};

}  // namespace resona
