// The new token of a sequence joins the cache: its key, value and context embedding, and the sum of the open
// chunk. A block does all of it.
//
//   rows of key and value                 copied as they are, 16 bytes at a time where they lie so
//   embedding -> history, row p mod W
//   embedding -> open sum                 8 lanes per retrieval head, lane e mod 8 as canonical sums want it
//   last token of a chunk: norm of the sum, unit vector -> chunk embeddings, sum = 0
//   in a search in two levels, that unit vector -> sum of the open superchunk, and so on
//
// Token by token the sum is that of pool.cuh, tokens in ascending order from zero, and so are norm and
// division: a chunk that closes here has the bits that prefill would give it. Nothing that is written here is
// read in the same step: the chunk becomes eligible for the next token only.
#pragma once

#include <cmath>

#include "cuda/attend_params.cuh"
#include "cuda/canonical_warp.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

// One token's rows of a tensor and the place of them in its cache, as bytes. Strides in bytes.
struct DecodeCopy {
  const unsigned char* from;
  int64_t from_batch, from_head;
  unsigned char* to;
  int64_t to_batch, to_token, to_head;
};

template <class T>
struct DecodeAppendParams {
  DecodeCopy key, value;
  int kv_heads;
  int64_t row_bytes;                             // of a head's key
  bool vector;                                   // all of them are rows of 16 bytes
  HeadRows<const T> context;                     // [B, 1, R, E]
  HeadRows<T> history, chunks;                   // [B, W, R, E], [B, C, R, E]
  float* open_sum;                               // [B, R, E]
  int64_t history_rows, heads, dim, chunk_size;  // W, R, E, S
  // Of a search in two levels, else null.
  HeadRows<T> superchunks;  // [B, C / P, R, E]
  float* superchunk_sum;    // [B, R, E]
  int64_t superchunk_size;  // P
};

template <class Word>
__device__ __forceinline__ void copy_heads(const DecodeCopy& c, int64_t batch, int64_t token, int heads,
                                           int64_t row_bytes) {
  const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t i = threadIdx.x; i < heads * words; i += blockDim.x) {
    const int64_t head = i / words, word = i % words;
    const unsigned char* from = c.from + batch * c.from_batch + head * c.from_head;
    unsigned char* to = c.to + batch * c.to_batch + token * c.to_token + head * c.to_head;
    reinterpret_cast<Word*>(to)[word] = reinterpret_cast<const Word*>(from)[word];
  }
}

template <class T>
__device__ __forceinline__ void keep_history(const DecodeAppendParams<T>& p, int64_t batch,
                                             int64_t position) {
  if (p.history_rows == 0) return;
  for (int64_t i = threadIdx.x; i < p.heads * p.dim; i += blockDim.x) {
    const int64_t head = i / p.dim, e = i % p.dim;
    p.history.at(batch, position % p.history_rows, head)[e] = p.context.at(batch, 0, head)[e];
  }
}

// Adds a row to a sum, eight lanes side by side; the squares of the new one, of this lane.
template <class T>
__device__ __forceinline__ double add_row(float* sum, const T* row, int64_t dim) {
  double squares = 0;
#pragma unroll 4
  for (int64_t e = threadIdx.x % canonical::kLanes; e < dim; e += canonical::kLanes) {
    const float x = sum[e] + to_float(row[e]);
    sum[e] = x;
    squares += static_cast<double>(x) * static_cast<double>(x);
  }
  return squares;
}

// A whole sum becomes a unit vector, and zero.
template <class T>
__device__ __forceinline__ void close_sum(float* sum, double squares, T* unit, int64_t dim) {
  const double norm = std::sqrt(fold_lanes(squares));
  for (int64_t e = threadIdx.x % canonical::kLanes; e < dim; e += canonical::kLanes) {
    from_float(canonical::unit(sum[e], norm), unit[e]);
    sum[e] = 0;
  }
}

template <class T>
__device__ __forceinline__ void fold_token(const DecodeAppendParams<T>& p, int64_t batch, int64_t position) {
  const int group = threadIdx.x / canonical::kLanes, groups = blockDim.x / canonical::kLanes;
  const int64_t chunk = position / p.chunk_size;
  const bool closes = (position + 1) % p.chunk_size == 0;
  for (int64_t first = 0; first < p.heads; first += groups) {
    const int64_t head = first + group, dim = head < p.heads ? p.dim : 0;  // idle lanes join the shuffles
    const int64_t at = (batch * p.heads + head) * p.dim;
    const double squares = add_row(p.open_sum + at, p.context.at(batch, 0, head), dim);
    if (!closes) continue;
    T* unit = p.chunks.at(batch, chunk, head);
    close_sum(p.open_sum + at, squares, unit, dim);
    if (p.superchunk_sum == nullptr) continue;
    const double upper = add_row(p.superchunk_sum + at, unit, dim);  // a lane reads what it has written
    if ((chunk + 1) % p.superchunk_size == 0)
      close_sum(p.superchunk_sum + at, upper, p.superchunks.at(batch, chunk / p.superchunk_size, head), dim);
  }
}

// The token at `position` of a sequence.
template <class T>
__device__ __forceinline__ void append_token(const DecodeAppendParams<T>& p, int64_t batch,
                                             int64_t position) {
  if (p.vector) {
    copy_heads<uint4>(p.key, batch, position, p.kv_heads, p.row_bytes);
    copy_heads<uint4>(p.value, batch, position, p.kv_heads, p.row_bytes);
  } else {
    copy_heads<uint16_t>(p.key, batch, position, p.kv_heads, p.row_bytes);
    copy_heads<uint16_t>(p.value, batch, position, p.kv_heads, p.row_bytes);
  }
  keep_history(p, batch, position);
  fold_token(p, batch, position);
}

}  // namespace resona::cuda
