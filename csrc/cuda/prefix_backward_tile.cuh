// What the tiles of the gradients of prefix linear attention are made of: parameters, g~, the gradients of
// scores, and the way back through the features,
//
//   through(x, P)_a = scale P_0a + scale^2 sum over b of P_ab x_b,   P_ab = <y, row of the pair (a, b)>
//
// with a warp for 16 rows and one element a. No pair has a weight of its own here: the half of x_a^2 meets
// the two of its derivative.
#pragma once

#include "cuda/prefix_forward.cuh"

namespace resona::cuda {

constexpr int kPrefixMostFeatureTiles = 4;  // of eight elements: f <= 32

template <class T>
struct PrefixBackwardParams {
  PrefixParams<T> forward;
  HeadRows<const T> out, out_gradient;                     // [B, T, H, V]
  PrefixStates gradient;                                   // of the final state
  HeadRows<T> query_gradient, key_gradient;                // [B, T, H, f]
  HeadRows<T> value_gradient;                              // [B, T, H, V]
  HeadRows<T> prefix_key_gradient;                         // [B, M, H, f]
  HeadRows<T> prefix_value_gradient;                       // [B, M, H, V]
  float *initial_state, *initial_normalizer;               // gradients [n, H, F, V] and [n, H, F], or null
  float *inverse, *denominator_gradient;                   // [part, H, T]
  float *query_partials, *key_partials, *prefix_partials;  // [slices, part, T or M, H, f], null for one slice
  int64_t part;                                            // batch entries of this part

  // Of a tile whose first token is row `first` of its tensors.
  __device__ __forceinline__ int64_t scalar_at(const PrefixPlace& at, int64_t first) const {
    const int64_t entry = at.batch - (forward.cu_seqlens == nullptr ? forward.first_sequence : 0);
    return (entry * forward.heads + at.head) * forward.tokens + first;
  }
};

// ---- g~

// <dy, y> of each row, over all columns.
template <class T>
__device__ __forceinline__ void dot_gradients(const PrefixBackwardParams<T>& p, const PrefixRows& rows,
                                              float* to) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int i = threadIdx.x / kWarpSize; i < kPrefixTokens; i += PrefixConfig::kWarps) {
    float sum = 0;
    if (rows.is_real(i)) {
      const T* y = p.out.at(rows.batch, rows.first + i, rows.head);
      const T* dy = p.out_gradient.at(rows.batch, rows.first + i, rows.head);
      for (int e = lane; e < p.forward.layout.value_dim; e += kWarpSize)
        sum += to_float(y[e]) * to_float(dy[e]);
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane == 0) to[i] = sum;
  }
}

// From <dy, y> in scalars[0] to 1 / den there and d den in scalars[1]; the first slice saves both.
template <class T>
__device__ __forceinline__ void find_denominators(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                                  const PrefixShared& s, const PrefixRows& rows) {
  const PrefixLayout& l = p.forward.layout;
  const int block = threadIdx.x / kWarpSize;
  if (block >= PrefixConfig::kBlocksOfRows) return;
  float c[1][4];
  multiply_values<T>(l, s, block, PrefixHalf{l.slice_values / 8, 1}, c);
  for_product(c, 1, [&](int row, int column, float x) {
    const int i = 16 * block + row;
    if (column != l.slice_values % 8) return;
    const float inverse = rows.is_real(i) ? 1 / (x + kPrefixEpsilon) : 0;
    const float gradient = -s.scalars[0][i] * inverse;
    s.scalars[0][i] = inverse, s.scalars[1][i] = gradient;
    if (i >= rows.count || at.slice > 0) return;
    p.inverse[p.scalar_at(at, rows.first + i)] = inverse;
    p.denominator_gradient[p.scalar_at(at, rows.first + i)] = gradient;
  });
}

template <class T>
__device__ __forceinline__ void load_denominators(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                                  const PrefixShared& s, const PrefixRows& rows) {
  const int i = threadIdx.x;
  if (i >= kPrefixTokens) return;
  const bool exists = i < rows.count;
  const int64_t from = p.scalar_at(at, rows.first + i);
  s.scalars[0][i] = exists ? p.inverse[from] : 0;
  s.scalars[1][i] = exists ? p.denominator_gradient[from] : 0;
}

// dy -> g~; d den counts once, in the first slice.
__device__ __forceinline__ void scale_gradients(const PrefixLayout& l, const PrefixPlace& at,
                                                const PrefixShared& s) {
  const int columns = l.slice_values + 1;
  for (int i = threadIdx.x; i < kPrefixTokens * columns; i += PrefixConfig::kThreads) {
    const int row = i / columns, column = i % columns;
    float& x = s.gradient[row * l.column_stride + column];
    if (column < l.slice_values)
      x *= s.scalars[0][row];
    else
      x = at.slice == 0 ? s.scalars[1][row] : 0;
  }
}

template <class T>
__device__ __forceinline__ void load_gradients(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                               const PrefixShared& s, const PrefixRows& rows) {
  load_values(p.forward, at, rows, p.out_gradient, false, s.gradient);
}

// ---- within a tile

// D, and with `weights` also W. Needs g~.
template <class T>
__device__ __forceinline__ void score_gradients(const PrefixBackwardParams<T>& p, const PrefixShared& s,
                                                bool weights) {
  const PrefixLayout& l = p.forward.layout;
  const int warp = threadIdx.x / kWarpSize, block = warp % 4, half = warp / 4;
  const float scale = p.forward.scale.linear;
  if (32 * half > 16 * block) return;
  float scores[4][4], c[4][4];
  multiply_keys<T>(l, s, block, half, scores);
  clear_product(c);
  add_product<2, kPrefixPieces<T>>(
      c, 4, 0, 8 * l.column_tiles,
      PrefixMatrix{s.gradient + 16 * block * l.column_stride, l.column_stride, 1},
      PrefixMatrix{s.value + 32 * half * l.column_stride, 1, l.column_stride});
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = 16 * block + lane / 4 + e / 2 * 8, j = 32 * half + 8 * n + 2 * (lane % 4) + e % 2;
      const float score = scores[n][e] * scale;
      s.score_gradient[i * kPrefixWeightStride + j] = j <= i ? c[n][e] * (1 + score) * scale : 0;
      if (weights) s.weight[i * kPrefixWeightStride + j] = j <= i ? taylor_weight(score) : 0;
    }
  }
}

// Which half of the pairs a tile adds to the gradients of its rows.
enum class PrefixPairs { kEarlierKeys, kLaterQueries, kNone };

// row_gradient = the tile's own pairs + scale <y, row of (0, a)>.
template <class T, PrefixPairs kPairs, int kPieces>
__device__ __forceinline__ void linear_gradients(const PrefixParams<T>& p, const PrefixShared& s,
                                                 const float* y) {
  const PrefixLayout& l = p.layout;
  const int tiles = (l.feature_dim + 7) / 8;
#pragma unroll 1
  for (int item = threadIdx.x / kWarpSize; item < PrefixConfig::kBlocksOfRows * tiles;
       item += PrefixConfig::kWarps) {
    const int block = item % PrefixConfig::kBlocksOfRows, tile = item / PrefixConfig::kBlocksOfRows;
    float c[1][4];
    clear_product(c);
    // Row 1 + a of a state is the pair (0, 1 + a); columns beyond f meet rows of other pairs and are not
    // kept.
    add_product<kPieces, 2>(c, 1, 0, 8 * l.column_tiles,
                            PrefixMatrix{y + 16 * block * l.column_stride, l.column_stride, 1},
                            PrefixMatrix{s.state + (1 + 8 * tile) * l.column_stride, 1, l.column_stride});
#pragma unroll
    for (int i = 0; i < 4; ++i) c[0][i] *= p.scale.linear;
    const int stride = kPrefixWeightStride;
    if constexpr (kPairs == PrefixPairs::kEarlierKeys)
      add_product<2, kPrefixPieces<T>>(c, 1, 0, 16 * block + 16,
                                       PrefixMatrix{s.score_gradient + 16 * block * stride, stride, 1},
                                       PrefixMatrix{s.key + 1 + 8 * tile, l.row_stride, 1});
    if constexpr (kPairs == PrefixPairs::kLaterQueries)
      add_product<2, kPrefixPieces<T>>(c, 1, 16 * block, kPrefixTokens,
                                       PrefixMatrix{s.score_gradient + 16 * block, 1, stride},
                                       PrefixMatrix{s.query + 1 + 8 * tile, l.row_stride, 1});
    for_product(c, 1, [&](int row, int column, float x) {
      const int a = 8 * tile + column;
      if (a < l.feature_dim) s.row_gradient[(16 * block + row) * l.row_stride + a] = x;
    });
  }
}

// row_gradient += scale^2 sum over b of <y, row of (a, b)> x_b
template <int kPieces>
__device__ __forceinline__ void quadratic_gradients(const PrefixLayout& l, const PrefixScale& scale,
                                                    const PrefixShared& s, const float* x, const float* y) {
  const int f = l.feature_dim, tiles = (f + 7) / 8;
#pragma unroll 1
  for (int item = threadIdx.x / kWarpSize; item < PrefixConfig::kBlocksOfRows * f;
       item += PrefixConfig::kWarps) {
    const int block = item % PrefixConfig::kBlocksOfRows, a = 1 + item / PrefixConfig::kBlocksOfRows;
    float c[kPrefixMostFeatureTiles][4];
    clear_product(c);
    const auto of_pair = [&](int column, int b) {
      return s.state[pair_row(a, b < f ? b + 1 : f, f) * l.column_stride + column];
    };
    add_product<kPieces, 2>(c, tiles, 0, 8 * l.column_tiles,
                            PrefixMatrix{y + 16 * block * l.column_stride, l.column_stride, 1}, of_pair);
    float sum[2] = {0, 0};
    for_product(c, tiles, [&](int row, int b, float product) {
      sum[row / 8] += product * x[(16 * block + row) * l.row_stride + 1 + b];  // zeros beyond f
    });
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 1);
      sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 2);
      const int lane = threadIdx.x % kWarpSize, row = 16 * block + lane / 4 + 8 * h;
      if (lane % 4 == 0) s.row_gradient[row * l.row_stride + a - 1] += scale.off_diagonal * sum[h];
    }
  }
}

// ---- results

// d q or d k of the first `count` rows, zero for those that are none; slices leave their shares to be
// gathered. `partials` [slices, part, tokens, H, f].
template <class T>
__device__ __forceinline__ void store_row_gradients(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                                    const PrefixShared& s, const PrefixRows& rows, int count,
                                                    const HeadRows<T>& to, float* partials, int64_t tokens) {
  const PrefixLayout& l = p.forward.layout;
  const int f = l.feature_dim;
  const int64_t entry = at.batch - (p.forward.cu_seqlens == nullptr ? p.forward.first_sequence : 0);
  for (int i = threadIdx.x; i < count * f; i += PrefixConfig::kThreads) {
    const int row = i / f, e = i % f;
    const int64_t token = rows.first + row;
    const float x = rows.is_real(row) ? s.row_gradient[row * l.row_stride + e] : 0;
    if (partials == nullptr)
      from_float(x, to.at(rows.batch, token, rows.head)[e]);
    else
      partials[(((at.slice * p.part + entry) * tokens + token) * p.forward.heads + rows.head) * f + e] = x;
  }
}

// d v = psi(k) R, on top of W^T g for tokens.
template <class T, bool kOwnPairs>
__device__ __forceinline__ void write_value_gradients(const PrefixParams<T>& p, const PrefixPlace& at,
                                                      const PrefixShared& s, const PrefixRows& rows,
                                                      int count, const HeadRows<T>& to) {
  const PrefixLayout& l = p.layout;
  const int warp = threadIdx.x / kWarpSize, block = warp % PrefixConfig::kBlocksOfRows;
  const PrefixHalf half = half_of(l, warp / PrefixConfig::kBlocksOfRows);
  float c[PrefixConfig::kMostTiles][4];
  clear_product(c);
  if constexpr (kOwnPairs)
    add_product<2, 2>(c, half.tiles, 16 * block, kPrefixTokens,
                      PrefixMatrix{s.weight + 16 * block, 1, kPrefixWeightStride},
                      PrefixMatrix{s.gradient + 8 * half.first, l.column_stride, 1});
  read_state(l, s, s.key, block, half, c);
  for_product(c, half.tiles, [&](int row, int column, float x) {
    const int i = 16 * block + row, value = 8 * half.first + column;
    if (value >= at.values || i >= count) return;
    from_float(rows.is_real(i) ? x : 0.f,
               to.at(rows.batch, rows.first + i, rows.head)[at.first_value + value]);
  });
}

}  // namespace resona::cuda
