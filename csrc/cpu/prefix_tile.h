// A tile of up to 64 tokens: its rows, both ways round, and the products that forward and backward share.
// Padding is loaded as zero rows, whatever it holds, and its feature 1 is zero too: so it adds nothing.
#pragma once

#include <algorithm>
#include <array>

#include "common/prefix_problem.h"
#include "cpu/executor.h"
#include "cpu/kernels.h"
#include "cpu/prefix_states.h"

namespace resona::cpu {

constexpr int64_t kTile = kPrefixTile;
constexpr double kPrefixEpsilon = 1e-12;  // added to every denominator

template <class A>
struct TileScratch {
  explicit TileScratch(const PrefixShape& s) {
    const int64_t f = padded(s.feature_dim), v = padded(s.value_dim), half = half_features(s.feature_dim);
    for (Buffer<A>* b : {&query, &query_rows, &key, &key_rows}) *b = Buffer<A>(f * kTile);
    for (Buffer<A>* b : {&query_features, &key_features}) *b = Buffer<A>(half * kTile);
    for (Buffer<A>* b : {&value, &out}) *b = Buffer<A>(v * kTile);
    for (Buffer<A>* b : {&score, &weight}) *b = Buffer<A>(kTile * kTile);
    for (Buffer<A>* b : {&ones, &denominator}) *b = Buffer<A>(kTile);
    std::fill_n(every.begin(), kTile, A(1));
  }
  Buffer<A> query, key;                    // [f, tile]
  Buffer<A> query_rows, key_rows;          // [tile, padded(f)]
  Buffer<A> query_features, key_features;  // [half features, tile]
  Buffer<A> value, out;                    // [tile, padded(V)]
  Buffer<A> score, weight;                 // [tile, tile]: s, and 1 + s + s^2 / 2 where j <= i
  Buffer<A> ones, denominator;             // [tile]
  std::array<A, kTile> every;              // all ones
};

// Rows [token, token + count) of a head as [tile, padded(dim)]; zero where `ones` is, and beyond `dim`.
template <class A>
void load_tile(const Rows& from, const PrefixSequence& s, int64_t head, int64_t token, int64_t count,
               int64_t dim, const A* ones, A* to) {
  const int64_t width = padded(dim);
  for (int64_t t = 0; t < kTile; ++t, to += width) {
    const bool real = t < count && ones[t] != 0;
    if (real) kernels<A>().load_row(from.dtype, from.at(s.batch, token + t, head), to, dim);
    std::fill(to + (real ? dim : 0), to + width, A(0));
  }
}

// [tile, padded(dim)] -> [dim, tile]
template <class A>
void transpose_tile(const A* rows, int64_t dim, A* to) {
  const int64_t width = padded(dim);
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t t = 0; t < kTile; ++t) to[d * kTile + t] = rows[t * width + d];
}

// Writes rows; zeros where `ones` is zero.
template <class A>
void store_tile(A* rows, const PrefixSequence& s, int64_t head, int64_t token, int64_t count, int64_t dim,
                const A* ones, const MutableRows& to) {
  const int64_t width = padded(dim);
  for (int64_t t = 0; t < count; ++t, rows += width) {
    if (ones[t] == 0) std::fill_n(rows, dim, A(0));
    kernels<A>().store_row(to.dtype, rows, to.at(s.batch, token + t, head), dim);
  }
}

// ones[t] for tokens [first, first + count) of the sequence.
template <class A>
void load_mask(const uint8_t* mask, const PrefixSequence& s, int64_t first, int64_t count, A* ones) {
  for (int64_t t = 0; t < kTile; ++t)
    ones[t] = t < count && (mask == nullptr || mask[s.mask_begin + first + t] != 0) ? A(1) : A(0);
}

// c [m, n] (+)= a [m, depth] b [depth, n]; `a` stored as its transpose with row length a_depth_stride.
template <class A>
void multiply(int64_t m, int64_t n, int64_t depth, const A* a, int64_t a_row_stride, int64_t a_depth_stride,
              const A* b, A* c, bool accumulate) {
  kernels<A>().gemm({m, n, depth, a, a_row_stride, a_depth_stride, b, n, c, n, accumulate});
}

// to[r] += sum over tokens of features[r][t] * factor[t], in sixteen partial sums.
template <class A>
void add_row_sums(const A* features, const A* factor, int64_t rows, A* to) {
  constexpr int64_t kLanes = 16;
  for (int64_t r = 0; r < rows; ++r, features += kTile) {
    A partial[kLanes] = {};
    for (int64_t t = 0; t < kTile; t += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) partial[l] += features[t + l] * factor[t + l];
    A total = 0;
    for (int64_t l = 0; l < kLanes; ++l) total += partial[l];
    to[r] += total;
  }
}

// Keys and values of a tile, and the keys' features.
template <class A>
void load_keys(const PrefixShape& shape, const Rows& key, const Rows& value, const PrefixSequence& s,
               int64_t head, int64_t token, int64_t count, TileScratch<A>& t) {
  const int64_t f = shape.feature_dim;
  load_tile(key, s, head, token, count, f, t.ones.data(), t.key_rows.data());
  transpose_tile(t.key_rows.data(), f, t.key.data());
  load_tile(value, s, head, token, count, shape.value_dim, t.ones.data(), t.value.data());
  expand(t.key.data(), t.ones.data(), f, key_weights<A>(), t.key_features.data());
}

// state += the tile's keys and values
template <class A>
void absorb(const PrefixShape& shape, TileScratch<A>& t, const State<A>& state) {
  const int64_t half = half_features(shape.feature_dim), width = padded(shape.value_dim);
  multiply<A>(half, width, kTile, t.key_features.data(), kTile, 1, t.value.data(), state.u, true);
  add_row_sums<A>(t.key_features.data(), t.every.data(), half, state.z);
}

template <class A>
void load_queries(const PrefixProblem& p, const PrefixSequence& s, int64_t head, int64_t token, int64_t count,
                  TileScratch<A>& t) {
  const int64_t f = p.shape.feature_dim;
  load_tile(p.query, s, head, token, count, f, t.ones.data(), t.query_rows.data());
  transpose_tile(t.query_rows.data(), f, t.query.data());
  expand(t.query.data(), t.every.data(), f, query_weights<A>(static_cast<A>(p.scale)),
         t.query_features.data());
}

// Scores and weights within the tile, and what each row's weights sum to. Later tokens and padding weigh 0.
template <class A>
void weigh(const PrefixProblem& p, TileScratch<A>& t) {
  multiply<A>(kTile, kTile, p.shape.feature_dim, t.query.data(), 1, kTile, t.key.data(), t.score.data(),
              false);
  const A scale = static_cast<A>(p.scale);
  const A* ones = t.ones.data();
  for (int64_t i = 0; i < kTile; ++i) {
    A* score = t.score.data() + i * kTile;
    A* weight = t.weight.data() + i * kTile;
    for (int64_t j = 0; j < kTile; ++j) {
      score[j] *= scale;
      weight[j] = (1 + score[j] + score[j] * score[j] / 2) * ones[j];
    }
    std::fill(weight + i + 1, weight + kTile, A(0));
  }
  std::fill_n(t.denominator.data(), kTile, A(0));
  add_row_sums<A>(t.weight.data(), t.every.data(), kTile, t.denominator.data());
}

// denominator = epsilon + the weights within the tile + those of everything before
template <class A>
void finish_denominator(const PrefixShape& shape, const State<A>& state, TileScratch<A>& t) {
  multiply<A>(1, kTile, half_features(shape.feature_dim), state.z, 0, 1, t.query_features.data(),
              t.denominator.data(), true);
  for (int64_t i = 0; i < kTile; ++i) t.denominator[i] += static_cast<A>(kPrefixEpsilon);
}

// Calls body(first token, count) for every tile of a piece, ascending or descending.
template <class Body>
void for_each_tile(const Piece& piece, bool descending, const Body& body) {
  const int64_t tiles = (piece.end - piece.begin + kTile - 1) / kTile;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = piece.begin + (descending ? tiles - 1 - i : i) * kTile;
    body(begin, std::min(kTile, piece.end - begin));
  }
}

// Sum of a piece of the tokens or of the prefix.
template <class A>
void sum_piece(const PrefixProblem& p, const Piece& piece, bool of_prefix, const State<A>& state,
               TileScratch<A>& t) {
  const PrefixSequence& s = *piece.sequence;
  const int64_t first = of_prefix ? s.prefix_begin : s.token_begin;
  for_each_tile(piece, false, [&](int64_t token, int64_t count) {
    load_mask(p.mask, s, token - first, count, t.ones.data());
    load_keys(p.shape, of_prefix ? p.prefix_key : p.key, of_prefix ? p.prefix_value : p.value, s, piece.head,
              token, count, t);
    absorb(p.shape, t, state);
  });
}

// Fills every token slot with the state that its segment starts from: the initial state, the prefix, and the
// segments before, added in this order.
template <class A>
void start_segments(const PrefixProblem& p, const Pieces& pieces, const Executor& executor, Slots<A>& slots) {
  const int64_t prefixes = static_cast<int64_t>(pieces.prefix.size());
  const int64_t tokens = static_cast<int64_t>(pieces.tokens.size());
  for_each_task(
      executor, prefixes + tokens, [&] { return TileScratch<A>(p.shape); },
      [&](TileScratch<A>& t, int64_t i) {
        const bool of_prefix = i < prefixes;
        const Piece& piece = of_prefix ? pieces.prefix[i] : pieces.tokens[i - prefixes];
        slots.clear(piece.slot);
        if (of_prefix || !piece.last) sum_piece(p, piece, of_prefix, slots.at(piece.slot), t);
      });
  for_each_task(
      executor, static_cast<int64_t>(pieces.lanes.size()), [&] { return Buffer<A>(slots.size()); },
      [&](Buffer<A>& running, int64_t i) {
        const Lane& lane = pieces.lanes[i];
        std::fill_n(running.data(), slots.size(), A(0));
        start_state(p.shape, lane.index * p.shape.heads + lane.head, p.initial_state, p.initial_normalizer,
                    StateWeights<A>::to_half(static_cast<A>(p.scale)), slots.view(running.data()));
        for (int64_t slot = lane.prefix_begin; slot < lane.prefix_end; ++slot)
          slots.add(slot, running.data());
        for (int64_t slot = lane.token_begin; slot < lane.token_end; ++slot)
          slots.exchange(slot, running.data());
      });
}

}  // namespace resona::cpu
