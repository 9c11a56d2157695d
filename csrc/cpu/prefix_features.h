// The second-order Taylor features of exp, as the sweeps use them:
//
//   1 + s + s^2 / 2,  s = scale <q, k>,  =  sum over r of  weight_r psi_r(q) psi_r(k)
//   psi(x) = [1, x_a, x_a x_b for a <= b]
//
// The products x_a x_b are symmetric, so f (f + 1) / 2 of the f^2 do, and all factors sit on the query's
// side. The operator's states hold all of phi(x) = [1, sqrt(scale) x_a, scale / sqrt(2) x_a x_b]: `pack` and
// `unpack` lead from one to the other, at the ends of a sequence only.
//
// Features are stored [feature, token], so every loop runs over the 64 tokens of a tile.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/plan_prefix.h"

namespace resona::cpu {

inline int64_t half_features(int64_t f) { return 1 + f + f * (f + 1) / 2; }

template <class A>
struct Weights {
  A linear, diagonal, off_diagonal;
};

template <class A>
Weights<A> query_weights(A scale) {
  return {scale, scale * scale / 2, scale * scale};
}

template <class A>
Weights<A> key_weights() {
  return {1, 1, 1};
}

// Calls body(feature, a, b, weight) for every pair a <= b.
template <class A, class Body>
void for_each_pair(int64_t f, const Weights<A>& w, const Body& body) {
  int64_t feature = 1 + f;
  for (int64_t a = 0; a < f; ++a)
    for (int64_t b = a; b < f; ++b, ++feature) body(feature, a, b, a == b ? w.diagonal : w.off_diagonal);
}

// x [f, tile] -> features [half_features(f), tile]; `ones` [tile] is zero for padding, as x is.
template <class A>
void expand(const A* x, const A* ones, int64_t f, const Weights<A>& w, A* features) {
  constexpr int64_t n = kPrefixTile;
  for (int64_t t = 0; t < n; ++t) features[t] = ones[t];
  for (int64_t i = 0; i < f * n; ++i) features[n + i] = w.linear * x[i];
  for_each_pair(f, w, [&](int64_t feature, int64_t a, int64_t b, A weight) {
    const A *xa = x + a * n, *xb = x + b * n;
    A* to = features + feature * n;
    for (int64_t t = 0; t < n; ++t) to[t] = weight * xa[t] * xb[t];
  });
}

// The gradient of `expand`, added to dx [f, tile].
template <class A>
void contract(const A* x, const A* gradient, int64_t f, const Weights<A>& w, A* dx) {
  constexpr int64_t n = kPrefixTile;
  for (int64_t i = 0; i < f * n; ++i) dx[i] += w.linear * gradient[n + i];
  for_each_pair(f, w, [&](int64_t feature, int64_t a, int64_t b, A weight) {
    const A *xa = x + a * n, *xb = x + b * n, *g = gradient + feature * n;
    A *da = dx + a * n, *db = dx + b * n;
    for (int64_t t = 0; t < n; ++t) da[t] += weight * g[t] * xb[t];
    for (int64_t t = 0; t < n; ++t) db[t] += weight * g[t] * xa[t];
  });
}

// Factors between half and full states. Those of a gradient are those of the other direction.
template <class A>
struct StateWeights {
  A linear, diagonal, off_diagonal;

  static StateWeights to_full(A scale) {
    const A second = scale / std::sqrt(A(2));
    return {std::sqrt(scale), second, second};
  }
  static StateWeights to_half(A scale) {
    const A second = std::sqrt(A(2)) / scale;
    return {1 / std::sqrt(scale), second, second / 2};
  }
};

// Full [F, columns] -> half [half_features(f), stride]. Only the symmetric part of a full state is ever read.
template <class A>
void pack(const A* full, int64_t f, int64_t columns, const StateWeights<A>& w, A* half, int64_t stride) {
  const auto row = [&](int64_t r) { return full + r * columns; };
  for (int64_t c = 0; c < columns; ++c) half[c] = full[c];
  for (int64_t a = 0; a < f; ++a)
    for (int64_t c = 0; c < columns; ++c) half[(1 + a) * stride + c] = w.linear * row(1 + a)[c];
  for_each_pair(f, Weights<A>{}, [&](int64_t feature, int64_t a, int64_t b, A) {
    const A *ab = row(1 + f + a * f + b), *ba = row(1 + f + b * f + a);
    for (int64_t c = 0; c < columns; ++c)
      half[feature * stride + c] = a == b ? w.diagonal * ab[c] : w.off_diagonal * (ab[c] + ba[c]);
  });
}

// Half -> full. `kept`, a full state or null, lends its antisymmetric part, which passes through untouched.
template <class A>
void unpack(const A* half, int64_t f, int64_t columns, const StateWeights<A>& w, int64_t stride,
            const A* kept, A* full) {
  for (int64_t c = 0; c < columns; ++c) full[c] = half[c];
  for (int64_t a = 0; a < f; ++a)
    for (int64_t c = 0; c < columns; ++c) full[(1 + a) * columns + c] = w.linear * half[(1 + a) * stride + c];
  for_each_pair(f, Weights<A>{}, [&](int64_t feature, int64_t a, int64_t b, A) {
    const int64_t ab = (1 + f + a * f + b) * columns, ba = (1 + f + b * f + a) * columns;
    for (int64_t c = 0; c < columns; ++c) {
      const A even = (a == b ? w.diagonal : w.off_diagonal) * half[feature * stride + c];
      const A odd = kept == nullptr ? A(0) : (kept[ab + c] - kept[ba + c]) / 2;
      full[ab + c] = even + odd;
      full[ba + c] = even - odd;
    }
  });
}

}  // namespace resona::cpu
