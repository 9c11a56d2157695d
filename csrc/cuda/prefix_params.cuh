// What the kernels of prefix linear attention are asked to do, and where a block stands. Tensors are
// head-last with a contiguous last dimension; the other strides are free, in elements.
//
// cu_seqlens and prefix_lengths come from the user and are never checked by the host: wrong values are
// clamped here, so they may give wrong numbers but nothing out of bounds.
#pragma once

#include "common/prefix_layout.h"
#include "cuda/attend_params.cuh"
#include "cuda/sequences.cuh"

namespace resona::cuda {

// Of the score, and of the weights with which a query meets a state: scale, scale^2 / 2 and scale^2.
struct PrefixScale {
  float linear, diagonal, off_diagonal;
  // From a state of the operator to sums of psi, and back.
  float pack_linear, pack_second, unpack_linear, unpack_second;
};

// States as the operator has them: [n, H, F, V] and [n, H, F].
struct PrefixStates {
  const float *state, *normalizer;  // null: zeros
};

template <class T>
struct PrefixParams {
  HeadRows<const T> query, key;                // [B, T, H, f]
  HeadRows<const T> value;                     // [B, T, H, V]
  HeadRows<const T> prefix_key, prefix_value;  // [B, M, H, f] and [B, M, H, V]
  const uint8_t* mask;                         // [B, T] zero: padding; null: none
  const int32_t* cu_seqlens;                   // [n + 1], null: not packed
  const int32_t* prefix_lengths;               // [n], null: all rows
  PrefixStates initial;
  HeadRows<T> out;              // [B, T, H, V]
  float *state, *normalizer;    // [n, H, F, V] and [n, H, F]
  int64_t first_sequence;       // of this part of the batch
  int64_t tokens, prefix_rows;  // T, M
  int heads;
  PrefixLayout layout;
  PrefixScale scale;
  bool vector_rows, vector_values;      // 16-byte loads
  int64_t segment;                      // tokens of a piece
  int64_t token_pieces, prefix_pieces;  // of a sequence; one token piece: nothing is cut
  float* slots;                         // [lanes, slices, pieces, state]

  __device__ __forceinline__ bool is_cut() const { return token_pieces > 1; }
  // Pieces of the tokens first, then those of the prefix.
  __device__ __forceinline__ float* slot(int64_t lane, int slice, int64_t piece) const {
    const int64_t pieces = token_pieces + prefix_pieces;
    return slots + ((lane * layout.slices + slice) * pieces + piece) *
                       (static_cast<int64_t>(layout.feature_rows) * layout.column_stride);
  }
};

// A sequence and head, and a slice of the value columns.
struct PrefixPlace {
  int64_t lane, row;  // of this part; of the states
  int64_t batch, head;
  int64_t begin, count;                             // tokens: rows of the tensors
  int64_t prefix_begin, prefix_count, prefix_rows;  // rows that count, and rows there are
  const uint8_t* mask;                              // of the first token, or null
  int slice, first_value, values;
};

// The block's number, innermost first: slice, piece, lane.
struct PrefixBlock {
  int slice;
  int64_t piece, lane;
};

__device__ __forceinline__ PrefixBlock prefix_block(int slices, int64_t pieces) {
  const int64_t block = blockIdx.x;
  return {static_cast<int>(block % slices), block / slices % pieces, block / slices / pieces};
}

template <class T>
__device__ __forceinline__ PrefixPlace prefix_place(const PrefixParams<T>& p, const PrefixBlock& block) {
  PrefixPlace at{};
  const int64_t sequence = p.first_sequence + block.lane / p.heads;
  at.lane = block.lane, at.head = block.lane % p.heads;
  at.row = sequence * p.heads + at.head;
  int64_t mask_begin = sequence * p.tokens;
  at.batch = sequence, at.count = p.tokens, at.prefix_rows = p.prefix_rows;
  if (p.cu_seqlens != nullptr) {
    at.batch = 0;
    at.begin = mask_begin = at.prefix_begin = clamp_token(p.cu_seqlens[sequence], p.tokens);
    const int64_t end = clamp_token(p.cu_seqlens[sequence + 1], p.tokens);
    at.count = end < at.begin ? 0 : end - at.begin;
    at.prefix_rows = p.prefix_rows == 0 ? 0 : at.count;
  }
  at.prefix_count = at.prefix_rows;
  if (p.prefix_lengths != nullptr) at.prefix_count = clamp_token(p.prefix_lengths[sequence], at.prefix_rows);
  at.mask = p.mask == nullptr ? nullptr : p.mask + mask_begin;
  at.slice = block.slice, at.first_value = block.slice * p.layout.slice_values;
  const int left = p.layout.value_dim - at.first_value;
  at.values = left < p.layout.slice_values ? left : p.layout.slice_values;
  return at;
}

// Tokens [begin, end) of a sequence, counted from its first.
struct PrefixRange {
  int64_t begin, end;
};

__device__ __forceinline__ PrefixRange prefix_range(int64_t piece, int64_t segment, int64_t count) {
  const int64_t begin = piece * segment, end = begin + segment;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace resona::cuda
