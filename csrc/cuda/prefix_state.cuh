// States between the operator's form, phi(k) v^T with all f^2 second-order features, and sums of psi(k) v~^T.
// What a state has beyond its symmetric part is never read, and passes through untouched.
#pragma once

#include "cuda/prefix_tile.cuh"

namespace resona::cuda {

// Row of phi for x~_a x~_b.
__device__ __forceinline__ int64_t full_row(int a, int b, int f) {
  return a == 0 ? b : 1 + f + static_cast<int64_t>(a - 1) * f + b - 1;
}

// One column of a full state, that of a value or the normalizer: element `row` is data[begin + row stride].
struct FullColumn {
  int64_t begin;
  int stride;
  __device__ __forceinline__ int64_t at(int64_t row) const { return begin + row * stride; }
};

__device__ __forceinline__ FullColumn full_column(const PrefixPlace& at, const PrefixLayout& l, int column) {
  const int64_t f = l.feature_dim, rows = 1 + f + f * f;
  if (column == l.slice_values) return {at.row * rows, 1};
  return {at.row * rows * l.value_dim + at.first_value + column, l.value_dim};
}

// Gradients of a state, as a slice of the columns sees them: that of the normalizer counts in the first only,
// as the gradients of keys are sums over the slices.
__device__ __forceinline__ PrefixStates of_slice(const PrefixStates& gradient, int slice) {
  return {gradient.state, slice == 0 ? gradient.normalizer : nullptr};
}

// Whether a column of a block's state is one of the operator's.
__device__ __forceinline__ bool is_column(const PrefixLayout& l, const PrefixPlace& at, int column) {
  return column < at.values || column == l.slice_values;
}

// Element (row of `pair`, column) of the sums that a state stands for.
__device__ __forceinline__ float packed_at(const PrefixStates& from, const PrefixPlace& at,
                                           const PrefixLayout& l, const PrefixScale& scale, PrefixPair pair,
                                           int column) {
  const int a = pair.a, b = pair.b, f = l.feature_dim;
  const float* full = column == l.slice_values ? from.normalizer : from.state;
  if (full == nullptr || a > f || !is_column(l, at, column)) return 0;
  const FullColumn in = full_column(at, l, column);
  const float x = full[in.at(full_row(a, b, f))];
  if (b == 0) return x;
  if (a == 0) return scale.pack_linear * x;
  if (a == b) return scale.pack_second * x;
  return scale.pack_second / 2 * (x + full[in.at(full_row(b, a, f))]);
}

// The operator's state from the block's. `kept` lends its antisymmetric part.
__device__ __forceinline__ void unpack_state(const PrefixLayout& l, const PrefixScale& scale,
                                             const PrefixPlace& at, const PrefixShared& s,
                                             const PrefixStates& kept, float* state, float* normalizer) {
  const int f = l.feature_dim, columns = l.slice_values + 1;
  for (int i = threadIdx.x; i < l.features * columns; i += PrefixConfig::kThreads) {
    const int row = i / columns, column = i % columns;
    const bool is_normalizer = column == l.slice_values;
    if (!is_column(l, at, column) || (is_normalizer && at.slice > 0)) continue;
    const int a = s.pairs[row].a, b = s.pairs[row].b;
    const FullColumn in = full_column(at, l, column);
    float* full = is_normalizer ? normalizer : state;
    const float* old = is_normalizer ? kept.normalizer : kept.state;
    const float weight = b == 0 ? 1 : a == 0 ? scale.unpack_linear : scale.unpack_second;
    const float even = weight * s.state[row * l.column_stride + column];
    const int64_t ab = in.at(full_row(a, b, f));
    if (a == 0 || a == b) {
      full[ab] = even;
      continue;
    }
    const int64_t ba = in.at(full_row(b, a, f));
    const float odd = old == nullptr ? 0 : (old[ab] - old[ba]) / 2;
    full[ab] = even + odd;
    full[ba] = even - odd;
  }
}

// ---- where a block's state comes from and goes to

__device__ __forceinline__ void clear_state(const PrefixLayout& l, const PrefixShared& s) {
  for (int i = threadIdx.x; i < l.feature_rows * l.column_stride; i += PrefixConfig::kThreads) s.state[i] = 0;
}

__device__ __forceinline__ void pack_state(const PrefixStates& from, const PrefixPlace& at,
                                           const PrefixLayout& l, const PrefixScale& scale,
                                           const PrefixShared& s) {
  const int size = l.feature_rows * l.column_stride;
  for (int i = threadIdx.x; i < size; i += PrefixConfig::kThreads)
    s.state[i] = packed_at(from, at, l, scale, s.pairs[i / l.column_stride], i % l.column_stride);
}

__device__ __forceinline__ void load_state(const float* slot, const PrefixLayout& l, const PrefixShared& s) {
  for (int i = threadIdx.x; i < l.feature_rows * l.column_stride; i += PrefixConfig::kThreads)
    s.state[i] = slot[i];
}

__device__ __forceinline__ void store_state(const PrefixLayout& l, const PrefixShared& s, float* slot) {
  for (int i = threadIdx.x; i < l.feature_rows * l.column_stride; i += PrefixConfig::kThreads)
    slot[i] = s.state[i];
}

}  // namespace resona::cuda
