// Prefix linear attention in time linear in the tokens.
//
//   1  every piece of the prefix, and of the tokens where a sequence is cut: its sum        plain reductions
//   2  each sequence and head: initial state + prefix + segments before, in order           one scan of
//   states 3  each segment, tile by tile of 64 tokens                                              the causal
//   sweep
//        weights = 1 + s + s^2 / 2 of the tile's own pairs j <= i
//        out = (weights V + psi(Q) U) / (weights 1 + psi(Q) z + 1e-12)
//        U += psi(K)^T V,  z += psi(K)^T 1
//
// U is [1 + f + f (f + 1) / 2, V] (39 KiB at f = 16, V = 64) and stays in cache; a token costs the same
// wherever it stands. No [T, T] and no [T, features] matrix exists in memory.
#include "cpu/prefix.h"
#include "cpu/prefix_tile.h"

namespace resona::cpu {
namespace {

template <class A>
void attend_tile(const PrefixProblem& p, const Piece& piece, int64_t token, int64_t count,
                 const State<A>& state, TileScratch<A>& t) {
  const PrefixSequence& s = *piece.sequence;
  const int64_t width = padded(p.shape.value_dim), half = half_features(p.shape.feature_dim);
  load_mask(p.mask, s, token - s.token_begin, count, t.ones.data());
  load_queries(p, s, piece.head, token, count, t);
  load_keys(p.shape, p.key, p.value, s, piece.head, token, count, t);
  weigh(p, t);
  finish_denominator(p.shape, state, t);
  multiply<A>(count, width, kTile, t.weight.data(), kTile, 1, t.value.data(), t.out.data(), false);
  multiply<A>(count, width, half, t.query_features.data(), 1, kTile, state.u, t.out.data(), true);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; ++d) t.out[i * width + d] /= t.denominator[i];
  store_tile(t.out.data(), s, piece.head, token, count, p.shape.value_dim, t.ones.data(), p.out);
  absorb(p.shape, t, state);
}

template <class A>
void run(const PrefixProblem& p, const PrefixPlan& plan, const Executor& executor) {
  const Pieces pieces(p.shape, *p.sequences, plan.segment);
  Slots<A> slots(p.shape, pieces.slots);
  start_segments(p, pieces, executor, slots);
  for_each_task(
      executor, static_cast<int64_t>(pieces.tokens.size()), [&] { return TileScratch<A>(p.shape); },
      [&](TileScratch<A>& t, int64_t i) {
        const Piece& piece = pieces.tokens[i];
        const State<A> state = slots.at(piece.slot);
        for_each_tile(piece, false,
                      [&](int64_t token, int64_t count) { attend_tile(p, piece, token, count, state, t); });
        if (piece.last)
          finish_state(p.shape, piece.index * p.shape.heads + piece.head, state,
                       StateWeights<A>::to_full(static_cast<A>(p.scale)), p.initial_state,
                       p.initial_normalizer, p.state, p.normalizer);
      });
}

}  // namespace

void prefix_linear_attention(const PrefixProblem& p, const PrefixPlan& plan, const Executor& executor) {
  const Caller caller;
  const Executor& threads = is_small(p.shape) ? caller : executor;
  p.query.dtype == DType::kFloat64 ? run<double>(p, plan, threads) : run<float>(p, plan, threads);
}

}  // namespace resona::cpu
