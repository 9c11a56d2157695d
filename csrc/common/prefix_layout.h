// A tile of prefix linear attention in a block's shared memory, as plans and kernels see it.
//
// With x~ = [1, x], the features psi(x) are the products x~_a x~_b, a <= b: one table of pairs drives all of
// them. With v~ = [v, 1], a state is one matrix, sum of psi(k) v~^T, whose last column is the normalizer. A
// block may take a slice of the value columns; the column of ones comes with every slice.
#pragma once

#include <cstdint>

namespace resona {

constexpr int kPrefixTokens = 64;                       // of a tile
constexpr int kPrefixWeightStride = kPrefixTokens + 4;  // rows of [token, token] matrices

// Numbers are counts of floats.
struct PrefixLayout {
  int feature_dim, value_dim;       // f, V
  int slices, slice_values;         // blocks that share the value columns, and how many one takes
  int features, feature_rows;       // (f + 1) (f + 2) / 2; rows of a state, filled up with zeros
  int column_tiles, column_stride;  // of eight: a slice and its ones; rows of states, values, gradients
  int row_stride;                   // rows of queries and keys
  int state, query, key, value, weight, pairs, scalars;  // where they begin
  int gradient, score_gradient, row_gradient;            // the same, of backward only
  int total;

  int state_size() const { return feature_rows * column_stride; }
};

PrefixLayout prefix_layout(int64_t feature_dim, int64_t value_dim, int64_t slices, bool backward);

}  // namespace resona
