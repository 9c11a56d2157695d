// What the forward and backward passes of attention share: reading the problem's small tensors, packing a
// tile of keys or values, gathering the query rows that selected a chunk.
#pragma once

#include <cstring>
#include <limits>

#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/lists.h"
#include "cpu/tasks.h"

namespace resona::cpu {

// Offsets into the contiguous tensors [B, T, H] and [B, T, R, k].
inline int64_t head_offset(const Shape& s, int64_t batch, int64_t query, int64_t head) {
  return (batch * s.queries + query) * s.heads + head;
}
inline int64_t slot_offset(const Shape& s, int64_t batch, int64_t query, int64_t retrieval_head) {
  return ((batch * s.queries + query) * s.retrieval_heads + retrieval_head) * s.top_k;
}

inline int64_t retrieval_head_of(const Shape& s, int64_t kv_head) {
  return kv_head / (s.kv_heads / s.retrieval_heads);
}

// What is added to every logit of the chunk in this slot.
template <class A>
A bias_at(const AttendProblem& p, int64_t offset, int64_t retrieval_head) {
  if (p.bias == nullptr) return A(0);
  const A bias = p.bias_dtype == DType::kFloat64 ? static_cast<A>(static_cast<const double*>(p.bias)[offset])
                                                 : static_cast<A>(static_cast<const float*>(p.bias)[offset]);
  return p.bias_scale == nullptr ? bias : static_cast<const A*>(p.bias_scale)[retrieval_head] * bias;
}

// The lists of rows [begin, end) of a sequence. A bias of -inf drops its chunk.
template <class A>
ChunkLists selection_lists(const AttendProblem& p, const Sequence& sequence, int64_t retrieval_head,
                           int64_t begin, int64_t end) {
  const int64_t chunks = sequence.token_count / p.shape.chunk_size;
  return build_lists(end - begin, p.shape.top_k, chunks, [&](int64_t row, int64_t slot) {
    const int64_t offset = slot_offset(p.shape, sequence.batch, begin + row, retrieval_head) + slot;
    const bool dropped = bias_at<A>(p, offset, retrieval_head) == -std::numeric_limits<A>::infinity();
    return p.indices[offset] < 0 || dropped ? -1 : p.indices[offset];
  });
}

// Rows [token, token + count) of one bfloat16 head, as they lie in the tensor.
inline TileRows tile_rows(const Rows& from, const Sequence& sequence, int64_t head, int64_t token,
                          int64_t count, int64_t dim) {
  const void* first = from.at(sequence.batch, token, head);
  return {static_cast<const uint16_t*>(first), from.token_stride, count, dim};
}

// Rows [token, token + count) of one head as [count, dim], padded with zero columns.
template <class A>
void load_tokens(const Rows& from, const Sequence& sequence, int64_t head, int64_t token, int64_t count,
                 int64_t dim, A* to) {
  const int64_t width = padded(dim);
  for (int64_t t = 0; t < count; ++t, to += width) {
    kernels<A>().load_row(from.dtype, from.at(sequence.batch, token + t, head), to, dim);
    std::fill(to + dim, to + width, A(0));
  }
}

// The transpose [dim, padded(count)] of what load_tokens gave.
template <class A>
void transpose_tokens(const A* from, int64_t count, int64_t dim, A* to) {
  kernels<A>().transpose(from, padded(dim), count, dim, to);
}

// A tile of rows that selected the same chunk: entry n / G of its run with query head n % G of its group.
struct RowTile {
  const Sequence* sequence;
  const Entry* entries;    // of the run
  int64_t kv_head, group;  // G query heads share the key/value head
  int64_t first_query;     // query row of entry.row == 0
  int64_t begin, count;    // n in [begin, begin + count)

  const Entry& entry(int64_t i) const { return entries[(begin + i) / group]; }
  int64_t query(int64_t i) const { return first_query + entry(i).row; }
  int64_t head(int64_t i) const { return kv_head * group + (begin + i) % group; }
  // Row of accumulators laid out [queries of the range, G].
  int64_t accumulator(int64_t i) const { return entry(i).row * group + (begin + i) % group; }
};

inline void accumulator_rows(const RowTile& tile, int32_t* rows) {
  const Entry* entry = &tile.entry(0);
  int64_t head = tile.begin % tile.group;
  for (int64_t i = 0; i < tile.count; ++i) {
    rows[i] = static_cast<int32_t>(entry->row * tile.group + head);
    if (++head == tile.group) ++entry, head = 0;
  }
}

// Heads lie apart, so each row is in a page of its own, and the processor does not foresee the next.
constexpr int64_t kRowsAhead = 8;

inline void fetch(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b);
}

// Calls body(row) for the rows of a tile in turn, and fetches those ahead.
template <class Body>
void for_each_gathered(const RowTile& tile, const Rows& from, int64_t dim, const Body& body) {
  const auto row_at = [&](int64_t i) { return from.at(tile.sequence->batch, tile.query(i), tile.head(i)); };
  const int64_t bytes = dim * size_of(from.dtype);
  for (int64_t i = 0; i < tile.count; ++i) {
    if (i + kRowsAhead < tile.count) fetch(row_at(i + kRowsAhead), bytes);
    body(row_at(i));
  }
}

template <class A>
void gather_rows(const RowTile& tile, const Rows& from, int64_t dim, A* to) {
  const int64_t width = padded(dim);
  for_each_gathered(tile, from, dim, [&](const void* row) {
    kernels<A>().load_row(from.dtype, row, to, dim);
    std::fill(to + dim, to + width, A(0));
    to += width;
  });
}

// What a range of queries has accumulated so far, [queries of the range, G].
template <class A>
struct Running {
  Running(int64_t rows, int64_t width) : width(width), sum(rows * width), peak(rows), total(rows) {}

  void reset(int64_t rows) {
    std::fill_n(sum.data(), rows * width, A(0));
    std::fill_n(peak.data(), rows, -std::numeric_limits<A>::infinity());
    std::fill_n(total.data(), rows, A(0));
  }

  int64_t width;
  Buffer<A> sum;          // weights times values, [rows, width]
  Buffer<A> peak, total;  // highest logit, sum of the weights
};

template <class A>
void gather_bias(const AttendProblem& p, const RowTile& tile, A* to) {
  const int64_t retrieval_head = retrieval_head_of(p.shape, tile.kv_head);
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t slots = slot_offset(p.shape, tile.sequence->batch, tile.query(i), retrieval_head);
    to[i] = bias_at<A>(p, slots + tile.entry(i).slot, retrieval_head);
  }
}

// Calls body(tile) for every tile of at most `most` rows of a run.
template <class Body>
void for_each_row_tile(const ChunkLists& lists, const Run& run, const Sequence& sequence, int64_t kv_head,
                       int64_t group, int64_t first_query, int64_t most, const Body& body) {
  const int64_t rows = (run.end - run.begin) * group;
  for (int64_t begin = 0; begin < rows; begin += most)
    body(RowTile{&sequence, lists.entries.data() + run.begin, kv_head, group, first_query, begin,
                 std::min(most, rows - begin)});
}

}  // namespace resona::cpu
