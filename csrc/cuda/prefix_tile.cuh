// A tile of 64 tokens of prefix linear attention, by eight warps.
//
//   x~ = [1, x], v~ = [v, 1]     rows of float32 in shared memory; rows of padding are all zero, also the one
//   psi(x)                       products x~_a x~_b, a <= b, made on the way into the tensor cores
//   state                        sum of psi(k) v~^T: rows of pairs, columns of values, the last the
//   normalizer
//
//   weigh    W = 1 + s + s^2 / 2 of the pairs j <= i              [64, f] x [f, 64]
//   read     c += psi(q) state, weighted by the powers of scale   [64, pairs] x [pairs, columns]
//   absorb   state += psi(k)^T v~                                 [pairs, 64] x [64, columns]
//
// Warp w has rows 16 (w % 4) and half w / 4 of the columns in all but the last, where it takes every eighth
// block of 16 pairs and one half. Products of an absorbed tile are summed on their own and then added, since
// tensor cores cut off where an addition rounds.
#pragma once

#include "cuda/prefix_params.cuh"
#include "cuda/prefix_product.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

struct PrefixConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kBlocksOfRows = kPrefixTokens / 16;
  static constexpr int kMostTiles = 9;  // half of 129 columns, in eights
};

constexpr float kPrefixEpsilon = 1e-12f;  // added to every denominator

struct PrefixPair {
  float weight;   // of the product in a query's features
  uint16_t a, b;  // elements of x~
};

struct PrefixShared {
  float* state;        // [pairs, columns]
  float *query, *key;  // [64, row]
  float* value;        // [64, columns]
  float* weight;       // [64, 64]
  PrefixPair* pairs;
  float* scalars[3];      // [64] each
  float* gradient;        // [64, columns], of backward: g~ = [dy / den, d den]
  float* score_gradient;  // [64, 64]
  float* row_gradient;    // [64, row]

  __device__ __forceinline__ PrefixShared(const PrefixLayout& l, unsigned char* memory) {
    float* m = reinterpret_cast<float*>(memory);
    state = m + l.state, query = m + l.query, key = m + l.key, value = m + l.value, weight = m + l.weight;
    pairs = reinterpret_cast<PrefixPair*>(m + l.pairs);
    for (int i = 0; i < 3; ++i) scalars[i] = m + l.scalars + i * kPrefixTokens;
    gradient = m + l.gradient, score_gradient = m + l.score_gradient, row_gradient = m + l.row_gradient;
  }
};

// ---- pairs

__device__ __forceinline__ int pair_row(int a, int b, int f) {
  return a <= b ? a * (f + 1) - a * (a - 1) / 2 + b - a : b * (f + 1) - b * (b - 1) / 2 + a - b;
}

__device__ __forceinline__ PrefixPair pair_of(int row, const PrefixLayout& l, const PrefixScale& s) {
  const int f = l.feature_dim;
  if (row >= l.features) return {0, static_cast<uint16_t>(f + 1), static_cast<uint16_t>(f + 1)};
  int a = 0;
  while (row > f - a) row -= f + 1 - a, ++a;
  const int b = a + row;
  const float weight = b == 0 ? 1 : a == 0 ? s.linear : a == b ? s.diagonal : s.off_diagonal;
  return {weight, static_cast<uint16_t>(a), static_cast<uint16_t>(b)};
}

__device__ __forceinline__ void write_pairs(const PrefixLayout& l, const PrefixScale& s, PrefixPair* to) {
  for (int row = threadIdx.x; row < l.feature_rows; row += PrefixConfig::kThreads)
    to[row] = pair_of(row, l, s);
}

// ---- rows of tokens

// Rows of a tile: token `first` of a tensor on, `count` of them, with the mask of the first.
struct PrefixRows {
  int64_t batch, head, first;
  int count;
  const uint8_t* mask;

  __device__ __forceinline__ bool is_real(int i) const {
    return i < count && (mask == nullptr || mask[i] != 0);
  }
};

__device__ __forceinline__ PrefixRows prefix_rows_at(const PrefixPlace& at, int64_t begin, int64_t token,
                                                     int64_t end) {
  const int64_t left = end - token;
  return {at.batch, at.head, begin + token, static_cast<int>(left < kPrefixTokens ? left : kPrefixTokens),
          at.mask == nullptr ? nullptr : at.mask + token};
}

// Elements [first, first + dim) of each row to columns `column`, ...; `one` gets 1; all else up to `width`,
// and all of a row that is none, zero.
struct PrefixColumns {
  int first, dim, column, one, width, stride;
};

template <class T, bool kVector>
__device__ __forceinline__ void load_rows_by(const PrefixRows& rows, const HeadRows<const T>& from,
                                             const PrefixColumns& c, float* to) {
  using Packs = Pack<T, kVector>;
  const int pieces = c.dim / Packs::kSize, before = c.column, behind = c.column + c.dim;
#pragma unroll 2
  for (int i = threadIdx.x; i < kPrefixTokens * pieces; i += PrefixConfig::kThreads) {
    const int row = i / pieces, e = i % pieces * Packs::kSize;
    Packs pack;
    pack.clear();
    if (rows.is_real(row)) pack.load(from.at(rows.batch, rows.first + row, rows.head) + c.first + e);
#pragma unroll
    for (int j = 0; j < Packs::kSize; ++j) to[row * c.stride + before + e + j] = to_float(pack.at[j]);
  }
  const int rest = c.width - c.dim;
  for (int i = threadIdx.x; i < kPrefixTokens * rest; i += PrefixConfig::kThreads) {
    const int row = i / rest, e = i % rest, column = e < before ? e : e - before + behind;
    to[row * c.stride + column] = column == c.one && rows.is_real(row) ? 1.f : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void load_rows(const PrefixRows& rows, const HeadRows<const T>& from, bool vector,
                                          const PrefixColumns& c, float* to) {
  if (vector)
    load_rows_by<T, true>(rows, from, c, to);
  else
    load_rows_by<T, false>(rows, from, c, to);
}

// x~ of queries or keys.
template <class T>
__device__ __forceinline__ void load_features(const PrefixParams<T>& p, const PrefixRows& rows,
                                              const HeadRows<const T>& from, float* to) {
  const PrefixLayout& l = p.layout;
  load_rows(rows, from, p.vector_rows, {0, l.feature_dim, 1, 0, l.row_stride, l.row_stride}, to);
}

// v~ of values; without its one also of their gradients.
template <class T>
__device__ __forceinline__ void load_values(const PrefixParams<T>& p, const PrefixPlace& at,
                                            const PrefixRows& rows, const HeadRows<const T>& from,
                                            bool with_one, float* to) {
  const PrefixLayout& l = p.layout;
  load_rows(
      rows, from, p.vector_values,
      {at.first_value, at.values, 0, with_one ? l.slice_values : -1, 8 * l.column_tiles, l.column_stride},
      to);
}

// ---- products

// The columns of a warp: eights [first, first + tiles).
struct PrefixHalf {
  int first, tiles;
};

__device__ __forceinline__ PrefixHalf half_of(const PrefixLayout& l, int half) {
  const int most = (l.column_tiles + 1) / 2, first = half * most, left = l.column_tiles - first;
  return {first, left < most ? left : most};
}

// psi of the rows from `first` on, weighted.
struct PrefixFeatures {
  const float* rows;
  int stride;
  const PrefixPair* pairs;

  __device__ __forceinline__ float operator()(int row, int k) const {
    const PrefixPair pair = pairs[k];
    const float* x = rows + row * stride;
    return pair.weight * x[pair.a] * x[pair.b];
  }
};

struct PrefixMatrix {
  const float* data;
  int row_stride, column_stride;
  __device__ __forceinline__ float operator()(int row, int column) const {
    return data[row * row_stride + column * column_stride];
  }
};

// One TF32 number per element where tensors have 16 bits.
template <class T>
constexpr int kPrefixPieces = sizeof(T) == 4 ? 2 : 1;

// <q, k> of rows 16 block and 32 columns from 32 half on.
template <class T>
__device__ __forceinline__ void multiply_keys(const PrefixLayout& l, const PrefixShared& s, int block,
                                              int half, float (&c)[4][4]) {
  const int stride = l.row_stride, depth = (l.feature_dim + 7) / 8 * 8;
  clear_product(c);
  add_product<kPrefixPieces<T>, kPrefixPieces<T>>(c, 4, 0, depth,
                                                  PrefixMatrix{s.query + 16 * block * stride + 1, stride, 1},
                                                  PrefixMatrix{s.key + 32 * half * stride + 1, 1, stride});
}

__device__ __forceinline__ float taylor_weight(float s) { return 1 + s + s * s / 2; }

// Later keys weigh nothing. Blocks of 16 x 16 above the diagonal are neither written nor ever read.
template <class T>
__device__ __forceinline__ void weigh(const PrefixParams<T>& p, const PrefixShared& s) {
  const int warp = threadIdx.x / kWarpSize, block = warp % 4, half = warp / 4;
  if (32 * half > 16 * block) return;
  float c[4][4];
  multiply_keys<T>(p.layout, s, block, half, c);
  for_product(c, 4, [&](int row, int column, float x) {
    const int i = 16 * block + row, j = 32 * half + column;
    s.weight[i * kPrefixWeightStride + j] = j <= i ? taylor_weight(x * p.scale.linear) : 0;
  });
}

// c += psi(x) state, of rows 16 block and the columns of `half`.
template <int kMost>
__device__ __forceinline__ void read_state(const PrefixLayout& l, const PrefixShared& s, const float* x,
                                           int block, const PrefixHalf& half, float (&c)[kMost][4]) {
  add_product<2, 2>(c, half.tiles, 0, l.feature_rows,
                    PrefixFeatures{x + 16 * block * l.row_stride, l.row_stride, s.pairs},
                    PrefixMatrix{s.state + 8 * half.first, l.column_stride, 1});
}

// state += psi(x)^T y; elements of y take kPieces TF32 numbers.
template <int kPieces>
__device__ __forceinline__ void absorb(const PrefixLayout& l, const PrefixShared& s, const float* x,
                                       const float* y) {
  const int blocks = l.feature_rows / 16;
#pragma unroll 1
  for (int item = threadIdx.x / kWarpSize; item < 2 * blocks; item += PrefixConfig::kWarps) {
    const int block = item / 2;
    const PrefixHalf half = half_of(l, item % 2);
    float c[PrefixConfig::kMostTiles][4];
    clear_product(c);
    const auto feature = [&](int row, int token) {
      const PrefixPair pair = s.pairs[16 * block + row];
      const float* of_token = x + token * l.row_stride;
      return of_token[pair.a] * of_token[pair.b];
    };
    add_product<2, kPieces>(c, half.tiles, 0, kPrefixTokens, feature,
                            PrefixMatrix{y + 8 * half.first, l.column_stride, 1});
    float* to = s.state + 16 * block * l.column_stride + 8 * half.first;
    for_product(c, half.tiles,
                [&](int row, int column, float x) { to[row * l.column_stride + column] += x; });
  }
}

}  // namespace resona::cuda
