// Gradients of prefix linear attention. No state and no weight is saved: both sweeps recompute them.
//
//   y = num / den;   g = [dy / den, -<dy, y> / den], the gradient of num and den of one token
//
//   1  as forward: what each segment starts from
//   2  forward sweep    carries  U = sum of psi(k) [v, 1]^T    ->  d query; 1 / den and d den of every token
//   3  each sequence and head: R = gradient of the final state + segments after, in order
//   4  reverse sweep    carries  R = sum of psi(q) g^T         ->  d key, d value
//   5  the prefix, and the initial state, meet the R of all tokens
//
//   d psi(q) = U g      d psi(k) = R [v, 1]      d v = R^T psi(k)      within a tile the same, pair by pair
//
// Every gradient has one owner and every sum one order: the same bits for any number of threads.
#include "cpu/prefix.h"
#include "cpu/prefix_tile.h"

namespace resona::cpu {
namespace {

template <class A>
struct Scratch {
  explicit Scratch(const PrefixShape& s) : tile(s) {
    const int64_t f = padded(s.feature_dim), v = padded(s.value_dim), half = half_features(s.feature_dim);
    for (Buffer<A>* b : {&value_transposed, &gradient, &gradient_transposed}) *b = Buffer<A>(v * kTile);
    score_gradient = Buffer<A>(kTile * kTile);
    feature_gradient = Buffer<A>(half * kTile);
    for (Buffer<A>* b : {&rows, &columns}) *b = Buffer<A>(f * kTile);
    for (Buffer<A>* b : {&inverse, &denominator_gradient}) *b = Buffer<A>(kTile);
  }
  TileScratch<A> tile;
  Buffer<A> value_transposed;               // [V, tile]
  Buffer<A> gradient, gradient_transposed;  // of num: [tile, padded(V)] and [V, tile]
  Buffer<A> score_gradient;                 // [tile, tile]
  Buffer<A> feature_gradient;               // [half features, tile]
  Buffer<A> rows, columns;                  // d query or d key: [tile, padded(f)] and [f, tile]
  Buffer<A> inverse, denominator_gradient;  // [tile]: 1 / den, d den
};

template <class A>
struct Pass {
  const PrefixBackwardProblem& p;
  A* inverse;               // [B, H, T]
  A* denominator_gradient;  // [B, H, T]

  const PrefixProblem& forward() const { return p.forward; }
  const PrefixShape& shape() const { return p.forward.shape; }
  A scale() const { return static_cast<A>(p.forward.scale); }
  int64_t offset(const Piece& piece, int64_t token) const {
    return (piece.sequence->batch * shape().heads + piece.head) * shape().tokens + token;
  }
};

// From d y to g: in the forward sweep out of the tile's denominators, which the reverse sweep finds saved.
template <class A>
void load_gradient(const Pass<A>& pass, const Piece& piece, int64_t token, int64_t count, bool saved,
                   Scratch<A>& s) {
  const int64_t dim = pass.shape().value_dim, width = padded(dim), at = pass.offset(piece, token);
  TileScratch<A>& t = s.tile;
  load_tile(pass.p.out_gradient, *piece.sequence, piece.head, token, count, dim, t.ones.data(),
            s.gradient.data());
  if (saved) {
    std::fill_n(s.inverse.data(), kTile, A(0));
    std::fill_n(s.denominator_gradient.data(), kTile, A(0));
    std::copy_n(pass.inverse + at, count, s.inverse.data());
    std::copy_n(pass.denominator_gradient + at, count, s.denominator_gradient.data());
  } else {
    const MutableRows& o = pass.forward().out;
    load_tile(Rows{o.data, o.batch_stride, o.token_stride, o.head_stride, o.dtype}, *piece.sequence,
              piece.head, token, count, dim, t.ones.data(), t.out.data());
    for (int64_t i = 0; i < kTile; ++i) {
      A dot = 0;
      for (int64_t d = 0; d < dim; ++d) dot += s.gradient[i * width + d] * t.out[i * width + d];
      s.inverse[i] = 1 / t.denominator[i];
      s.denominator_gradient[i] = -dot * s.inverse[i];
    }
    std::copy_n(s.inverse.data(), count, pass.inverse + at);
    std::copy_n(s.denominator_gradient.data(), count, pass.denominator_gradient + at);
  }
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t d = 0; d < width; ++d) s.gradient[i * width + d] *= s.inverse[i];
}

// d score = (<g num, v> + g den) (1 + s) within the tile, times the scale that leads on to q and k.
template <class A>
void score_gradients(const Pass<A>& pass, Scratch<A>& s) {
  TileScratch<A>& t = s.tile;
  const int64_t dim = pass.shape().value_dim;
  transpose_tile(t.value.data(), dim, s.value_transposed.data());
  multiply<A>(kTile, kTile, dim, s.gradient.data(), padded(dim), 1, s.value_transposed.data(),
              s.score_gradient.data(), false);
  for (int64_t i = 0; i < kTile; ++i) {
    A* row = s.score_gradient.data() + i * kTile;
    const A* score = t.score.data() + i * kTile;
    const A extra = s.denominator_gradient[i];
    for (int64_t j = 0; j <= i; ++j) row[j] = (row[j] + extra) * (1 + score[j]) * t.ones[j] * pass.scale();
    std::fill(row + i + 1, row + kTile, A(0));
  }
}

// R += psi(q) g^T
template <class A>
void absorb_gradient(const Pass<A>& pass, Scratch<A>& s, const State<A>& r) {
  const int64_t half = half_features(pass.shape().feature_dim);
  const A* features = s.tile.query_features.data();
  multiply<A>(half, padded(pass.shape().value_dim), kTile, features, kTile, 1, s.gradient.data(), r.u, true);
  add_row_sums<A>(features, s.denominator_gradient.data(), half, r.z);
}

// rows += contract(x, state [vectors, factor]), the way through the features.
template <class A>
void through_features(const PrefixShape& shape, const State<A>& state, const A* vectors, const A* factor,
                      const A* x, const Weights<A>& weights, Scratch<A>& s) {
  const int64_t f = shape.feature_dim, half = half_features(f), width = padded(f);
  multiply<A>(half, kTile, shape.value_dim, state.u, padded(shape.value_dim), 1, vectors,
              s.feature_gradient.data(), false);
  for (int64_t r = 0; r < half; ++r)
    for (int64_t i = 0; i < kTile; ++i) s.feature_gradient[r * kTile + i] += state.z[r] * factor[i];
  std::fill_n(s.columns.data(), f * kTile, A(0));
  contract<A>(x, s.feature_gradient.data(), f, weights, s.columns.data());
  for (int64_t d = 0; d < f; ++d)
    for (int64_t i = 0; i < kTile; ++i) s.rows[i * width + d] += s.columns[d * kTile + i];
}

template <class A>
void query_tile(const Pass<A>& pass, const Piece& piece, int64_t token, int64_t count, const State<A>& state,
                const State<A>* gradient_sum, Scratch<A>& s) {
  const PrefixProblem& f = pass.forward();
  const PrefixSequence& q = *piece.sequence;
  const int64_t dim = pass.shape().feature_dim;
  TileScratch<A>& t = s.tile;
  load_mask(f.mask, q, token - q.token_begin, count, t.ones.data());
  load_queries(f, q, piece.head, token, count, t);
  load_keys(f.shape, f.key, f.value, q, piece.head, token, count, t);
  weigh(f, t);
  finish_denominator(f.shape, state, t);
  load_gradient(pass, piece, token, count, false, s);
  score_gradients(pass, s);
  multiply<A>(kTile, padded(dim), kTile, s.score_gradient.data(), kTile, 1, t.key_rows.data(), s.rows.data(),
              false);
  transpose_tile(s.gradient.data(), f.shape.value_dim, s.gradient_transposed.data());
  through_features<A>(f.shape, state, s.gradient_transposed.data(), s.denominator_gradient.data(),
                      t.query.data(), query_weights<A>(pass.scale()), s);
  store_tile(s.rows.data(), q, piece.head, token, count, dim, t.ones.data(), pass.p.query_gradient);
  absorb(f.shape, t, state);
  if (gradient_sum != nullptr) absorb_gradient(pass, s, *gradient_sum);
}

// d value = psi(k) R on top of what `out` holds; d key likewise on top of `rows`.
template <class A>
void keys_meet(const Pass<A>& pass, const State<A>& r, bool accumulate, Scratch<A>& s) {
  TileScratch<A>& t = s.tile;
  const PrefixShape& shape = pass.shape();
  multiply<A>(kTile, padded(shape.value_dim), half_features(shape.feature_dim), t.key_features.data(), 1,
              kTile, r.u, t.out.data(), accumulate);
  through_features<A>(shape, r, s.value_transposed.data(), t.every.data(), t.key.data(), key_weights<A>(), s);
}

template <class A>
void key_tile(const Pass<A>& pass, const Piece& piece, int64_t token, int64_t count, const State<A>& r,
              Scratch<A>& s) {
  const PrefixProblem& f = pass.forward();
  const PrefixSequence& q = *piece.sequence;
  const int64_t dim = pass.shape().feature_dim, width = padded(f.shape.value_dim);
  TileScratch<A>& t = s.tile;
  load_mask(f.mask, q, token - q.token_begin, count, t.ones.data());
  load_queries(f, q, piece.head, token, count, t);
  load_keys(f.shape, f.key, f.value, q, piece.head, token, count, t);
  weigh(f, t);
  load_gradient(pass, piece, token, count, true, s);
  score_gradients(pass, s);
  multiply<A>(kTile, width, kTile, t.weight.data(), 1, kTile, s.gradient.data(), t.out.data(), false);
  multiply<A>(kTile, padded(dim), kTile, s.score_gradient.data(), 1, kTile, t.query_rows.data(),
              s.rows.data(), false);
  keys_meet(pass, r, true, s);
  store_tile(s.rows.data(), q, piece.head, token, count, dim, t.ones.data(), pass.p.key_gradient);
  store_tile(t.out.data(), q, piece.head, token, count, f.shape.value_dim, t.ones.data(),
             pass.p.value_gradient);
  absorb_gradient(pass, s, r);
}

template <class A>
void prefix_tile(const Pass<A>& pass, const Piece& piece, int64_t token, int64_t count, const State<A>& r,
                 Scratch<A>& s) {
  const PrefixProblem& f = pass.forward();
  const PrefixSequence& q = *piece.sequence;
  TileScratch<A>& t = s.tile;
  load_mask(f.mask, q, token - q.prefix_begin, count, t.ones.data());
  load_keys(f.shape, f.prefix_key, f.prefix_value, q, piece.head, token, count, t);
  transpose_tile(t.value.data(), f.shape.value_dim, s.value_transposed.data());
  std::fill_n(s.rows.data(), padded(f.shape.feature_dim) * kTile, A(0));
  keys_meet(pass, r, false, s);
  store_tile(s.rows.data(), q, piece.head, token, count, f.shape.feature_dim, t.ones.data(),
             pass.p.prefix_key_gradient);
  store_tile(t.out.data(), q, piece.head, token, count, f.shape.value_dim, t.ones.data(),
             pass.p.prefix_value_gradient);
}

// Steps 1 and 2. A sequence that is cut also leaves the sum of psi(q) g^T of each segment but the first.
template <class A>
void query_sweep(const Pass<A>& pass, const Pieces& pieces, const Executor& executor, Slots<A>& sums) {
  Slots<A> states(pass.shape(), pieces.slots);
  start_segments(pass.forward(), pieces, executor, states);
  for_each_task(
      executor, static_cast<int64_t>(pieces.tokens.size()), [&] { return Scratch<A>(pass.shape()); },
      [&](Scratch<A>& s, int64_t i) {
        const Piece& piece = pieces.tokens[i];
        const State<A> state = states.at(piece.slot), sum = sums.at(piece.slot);
        sums.clear(piece.slot);
        for_each_tile(piece, false, [&](int64_t token, int64_t count) {
          query_tile(pass, piece, token, count, state, piece.first ? nullptr : &sum, s);
        });
      });
}

template <class A>
void scan_from_the_end(const Pass<A>& pass, const Pieces& pieces, const Executor& executor, Slots<A>& sums) {
  const PrefixShape& shape = pass.shape();
  for_each_task(
      executor, static_cast<int64_t>(pieces.lanes.size()), [&] { return Buffer<A>(sums.size()); },
      [&](Buffer<A>& running, int64_t i) {
        const Lane& lane = pieces.lanes[i];
        std::fill_n(running.data(), sums.size(), A(0));
        start_state(shape, lane.index * shape.heads + lane.head, pass.p.state_gradient,
                    pass.p.normalizer_gradient, StateWeights<A>::to_full(pass.scale()),
                    sums.view(running.data()));
        for (int64_t slot = lane.token_end; slot-- > lane.token_begin;) sums.exchange(slot, running.data());
      });
}

template <class A>
void key_sweep(const Pass<A>& pass, const Pieces& pieces, const Executor& executor, Slots<A>& sums) {
  const PrefixBackwardProblem& p = pass.p;
  for_each_task(
      executor, static_cast<int64_t>(pieces.tokens.size()), [&] { return Scratch<A>(pass.shape()); },
      [&](Scratch<A>& s, int64_t i) {
        const Piece& piece = pieces.tokens[i];
        const State<A> r = sums.at(piece.slot);
        for_each_tile(piece, true,
                      [&](int64_t token, int64_t count) { key_tile(pass, piece, token, count, r, s); });
        if (piece.first && p.initial_state_gradient != nullptr)
          finish_state(pass.shape(), piece.index * pass.shape().heads + piece.head, r,
                       StateWeights<A>::to_half(pass.scale()), p.state_gradient, p.normalizer_gradient,
                       p.initial_state_gradient, p.initial_normalizer_gradient);
      });
}

template <class A>
void prefix_gradients(const Pass<A>& pass, const Pieces& pieces, const Executor& executor, Slots<A>& sums) {
  for_each_task(
      executor, static_cast<int64_t>(pieces.prefix.size()), [&] { return Scratch<A>(pass.shape()); },
      [&](Scratch<A>& s, int64_t i) {
        const Piece& piece = pieces.prefix[i];
        const Lane& lane = pieces.lanes[piece.index * pass.shape().heads + piece.head];
        const State<A> r = sums.at(lane.token_begin);
        for_each_tile(piece, false,
                      [&](int64_t token, int64_t count) { prefix_tile(pass, piece, token, count, r, s); });
      });
}

template <class A>
void run(const PrefixBackwardProblem& p, const PrefixPlan& plan, const Executor& executor) {
  const PrefixShape& shape = p.forward.shape;
  const int64_t rows = shape.batch * shape.heads * shape.tokens;
  Buffer<A> inverse(rows), denominator_gradient(rows);
  const Pass<A> pass{p, inverse.data(), denominator_gradient.data()};
  const Pieces pieces(shape, *p.forward.sequences, plan.segment);
  Slots<A> sums(shape, pieces.slots);
  query_sweep(pass, pieces, executor, sums);
  scan_from_the_end(pass, pieces, executor, sums);
  key_sweep(pass, pieces, executor, sums);
  prefix_gradients(pass, pieces, executor, sums);
}

}  // namespace

void prefix_linear_attention_backward(const PrefixBackwardProblem& p, const PrefixPlan& plan,
                                      const Executor& executor) {
  const Caller caller;
  const Executor& threads = is_small(p.forward.shape) ? caller : executor;
  p.forward.query.dtype == DType::kFloat64 ? run<double>(p, plan, threads) : run<float>(p, plan, threads);
}

}  // namespace resona::cpu
