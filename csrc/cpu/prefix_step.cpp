// One token of prefix linear attention: state += phi(k) v^T, out = phi(q) state / (phi(q) normalizer +
// 1e-12). One pass over a state of constant size, so time is that of reading and writing it. A task per
// sequence and head; work too small for several threads runs on the caller's.
#include <algorithm>
#include <cmath>

#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/prefix.h"
#include "cpu/prefix_states.h"

namespace resona::cpu {
namespace {

template <class A>
struct Scratch {
  explicit Scratch(const PrefixShape& s)
      : rows(3 * padded(std::max(s.feature_dim, s.value_dim))),
        features(2 * s.features()),
        sum(s.value_dim) {}
  Buffer<A> rows, features, sum;
};

// phi(x) = [1, sqrt(scale) x, scale / sqrt(2) x x^T]
template <class A>
void features_of(const A* x, int64_t f, A scale, A* to) {
  const A first = std::sqrt(scale), second = scale / std::sqrt(A(2));
  *to++ = 1;
  for (int64_t a = 0; a < f; ++a) *to++ = first * x[a];
  for (int64_t a = 0; a < f; ++a)
    for (int64_t b = 0; b < f; ++b) *to++ = second * (x[a] * x[b]);
}

template <class A>
void step(const PrefixStepProblem& p, int64_t batch, int64_t head, Scratch<A>& s) {
  const int64_t f = p.shape.feature_dim, dim = p.shape.value_dim, features = p.shape.features();
  const Kernels<A>& kernel = kernels<A>();
  A* sum = s.sum.data();
  std::fill_n(sum, dim, A(0));
  if (p.mask == nullptr || p.mask[batch] != 0) {
    const int64_t row = batch * p.shape.heads + head, stride = padded(std::max(f, dim));
    A *query = s.rows.data(), *key = query + stride, *value = key + stride;
    kernel.load_row(p.query.dtype, p.query.at(batch, 0, head), query, f);
    kernel.load_row(p.key.dtype, p.key.at(batch, 0, head), key, f);
    kernel.load_row(p.value.dtype, p.value.at(batch, 0, head), value, dim);
    A *query_features = s.features.data(), *key_features = query_features + features;
    features_of(query, f, static_cast<A>(p.scale), query_features);
    features_of(key, f, static_cast<A>(p.scale), key_features);
    A* state = static_cast<A*>(p.state) + row * features * dim;
    A* normalizer = static_cast<A*>(p.normalizer) + row * features;
    A denominator = 0;
    for (int64_t r = 0; r < features; ++r, state += dim) {
      kernel.add_scaled(key_features[r], value, state, dim);
      kernel.add_scaled(query_features[r], state, sum, dim);
      normalizer[r] += key_features[r];
      denominator += query_features[r] * normalizer[r];
    }
    for (int64_t d = 0; d < dim; ++d) sum[d] /= denominator + A(1e-12);
  }
  kernel.store_row(p.out.dtype, sum, p.out.at(batch, 0, head), dim);
}

template <class A>
void run(const PrefixStepProblem& p, const Executor& executor) {
  const PrefixShape& s = p.shape;
  const Caller caller;
  for_each_task(
      is_small(s) ? caller : executor, s.batch * s.heads, [&] { return Scratch<A>(s); },
      [&](Scratch<A>& scratch, int64_t i) { step(p, i / s.heads, i % s.heads, scratch); });
}

}  // namespace

void prefix_linear_attention_step(const PrefixStepProblem& p, const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? run<double>(p, executor) : run<float>(p, executor);
}

}  // namespace resona::cpu
