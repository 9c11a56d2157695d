// How sequences are cut, and the states between the pieces.
//
//   tokens of one sequence and head     | segment 0 | segment 1 | ... |
//   prefix of one sequence and head     | piece 0 | piece 1 | ... |
//
// Every piece owns a slot, which holds its sum first and, after the scan in order, the state that it starts
// from. So a task reads and writes one slot, whoever runs it and when.
#pragma once

#include "common/plan_prefix.h"
#include "cpu/buffer.h"
#include "cpu/prefix_features.h"

namespace resona::cpu {

// Sums over tokens: u = sum of psi(k) v^T, z = sum of psi(k).
template <class A>
struct State {
  A* u;  // [half_features(f), padded(V)]
  A* z;  // [half_features(f)]
};

// Waking a thread costs microseconds: below this many multiplications the caller works alone.
constexpr int64_t kWorthThreads = 1 << 20;

inline bool is_small(const PrefixShape& s) {
  return s.batch * (s.tokens + s.prefix_rows) * s.heads * half_features(s.feature_dim) * s.value_dim <
         kWorthThreads;
}

struct Piece {
  const PrefixSequence* sequence;
  int64_t index, head;  // of the sequence
  int64_t begin, end;   // rows of the tokens, or of the prefix
  int64_t slot;
  bool first, last;  // of its sequence
};

struct Lane {  // one sequence and head
  int64_t index, head;
  int64_t prefix_begin, prefix_end, token_begin, token_end;  // slots
};

struct Pieces {
  std::vector<Piece> tokens, prefix;
  std::vector<Lane> lanes;
  int64_t slots = 0;

  Pieces(const PrefixShape& shape, const std::vector<PrefixSequence>& sequences, int64_t segment) {
    for (int64_t i = 0; i < static_cast<int64_t>(sequences.size()); ++i)
      for (int64_t head = 0; head < shape.heads; ++head) {
        const PrefixSequence& s = sequences[i];
        Lane lane{i, head, slots, 0, 0, 0};
        cut(prefix, s, i, head, s.prefix_begin, s.prefix_count, segment);
        lane.prefix_end = lane.token_begin = slots;
        cut(tokens, s, i, head, s.token_begin, s.token_count, segment);
        lane.token_end = slots;
        lanes.push_back(lane);
      }
  }

 private:
  // At least one piece, so that every sequence has someone to write its state.
  void cut(std::vector<Piece>& to, const PrefixSequence& s, int64_t index, int64_t head, int64_t first,
           int64_t count, int64_t segment) {
    int64_t begin = 0;
    do {
      const int64_t end = std::min(begin + segment, count);
      to.push_back({&s, index, head, first + begin, first + end, slots++, begin == 0, end == count});
      begin = end;
    } while (begin < count);
  }
};

// Zero, or a full state. `weights` are those of pack.
template <class A>
void start_state(const PrefixShape& s, int64_t row, const void* state, const void* normalizer,
                 const StateWeights<A>& weights, const State<A>& to) {
  const int64_t f = s.feature_dim, width = padded(s.value_dim);
  std::fill_n(to.u, half_features(f) * width, A(0));
  std::fill_n(to.z, half_features(f), A(0));
  if (state != nullptr)
    pack(static_cast<const A*>(state) + row * s.features() * s.value_dim, f, s.value_dim, weights, to.u,
         width);
  if (normalizer != nullptr)
    pack(static_cast<const A*>(normalizer) + row * s.features(), f, 1, weights, to.z, 1);
}

template <class A>
void finish_state(const PrefixShape& s, int64_t row, const State<A>& from, const StateWeights<A>& weights,
                  const void* kept_state, const void* kept_normalizer, void* state, void* normalizer) {
  const int64_t f = s.feature_dim, size = s.features() * s.value_dim;
  const A* kept_u = kept_state == nullptr ? nullptr : static_cast<const A*>(kept_state) + row * size;
  const A* kept_z =
      kept_normalizer == nullptr ? nullptr : static_cast<const A*>(kept_normalizer) + row * s.features();
  unpack(from.u, f, s.value_dim, weights, padded(s.value_dim), kept_u, static_cast<A*>(state) + row * size);
  unpack(from.z, f, 1, weights, 1, kept_z, static_cast<A*>(normalizer) + row * s.features());
}

template <class A>
class Slots {
 public:
  Slots(const PrefixShape& s, int64_t count)
      : u_size_(half_features(s.feature_dim) * padded(s.value_dim)),
        size_(u_size_ + padded(half_features(s.feature_dim))),
        data_(count * size_) {}

  State<A> at(int64_t slot) {
    A* u = data_.data() + slot * size_;
    return {u, u + u_size_};
  }
  void clear(int64_t slot) { std::fill_n(at(slot).u, size_, A(0)); }

  // running += slot
  void add(int64_t slot, A* running) {
    const A* from = at(slot).u;
    for (int64_t i = 0; i < size_; ++i) running[i] += from[i];
  }
  // slot = running; running += what the slot was
  void exchange(int64_t slot, A* running) {
    A* own = at(slot).u;
    for (int64_t i = 0; i < size_; ++i) {
      const A before = running[i];
      running[i] += own[i];
      own[i] = before;
    }
  }
  int64_t size() const { return size_; }
  State<A> view(A* memory) const { return {memory, memory + u_size_}; }

 private:
  int64_t u_size_, size_;
  Buffer<A> data_;
};

}  // namespace resona::cpu
