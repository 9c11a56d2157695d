// The rows of a search: what a block of queries knows of its candidates while tiles of chunks go by.
//
// A tile of quick products (fp32, or bfloat16 on matrix tiles) meets each row's threshold: the k-th best
// product so far less twice a proven bound on its error. What is not below becomes a candidate, and what is
// left of those in the end is scored canonically. So a row's list is exact over the chunks that it met, on
// any data; ties and repeated text only mean more candidates. When a row's buffer of them is full, they are
// scored canonically at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "common/canonical.h"
#include "common/filter.h"
#include "common/plan.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/stage_clock.h"
#include "cpu/tasks.h"

namespace resona::cpu {

struct SearchQuery {
  double norm;         // of the raw query, canonical
  double filter_norm;  // of the filter query: the raw one divided by a power of two
  bool exhaustive;     // the filter says nothing about this row
  int64_t eligible;    // chunks in its past
  int64_t found;       // filled slots
  int64_t candidates;
};

// Rows whose products are computed at a time: they and a tile of chunks stay in the first cache.
constexpr int64_t kProductRows = 48;
constexpr int64_t kScoredTogether = 8;

template <class A>
struct SearchScratch {
  // tile_rows: of the queries, that meet a tile of chunks at once.
  SearchScratch(const SearchPlan& plan, int64_t dim, int64_t slots, int64_t tile_rows)
      : slots(slots),
        capacity(2 * slots + 2 * plan.chunk_block),
        candidate_stride(capacity + FilterRow::kLanes),
        best_stride(std::max(slots, FilterRow::kLanes)),
        raw(plan.query_block * dim),
        filter(plan.query_block * dim),
        chunks(plan.chunk_block * dim),
        packed(padded(plan.chunk_block) * dim),
        tile(padded_tile(tile_rows) * padded(plan.chunk_block)),
        scores(plan.query_block * slots),
        indices(plan.query_block * slots),
        best(plan.query_block * best_stride),
        products(plan.query_block * candidate_stride),
        candidates(plan.query_block * candidate_stride),
        queries(plan.query_block),
        scored(kScoredTogether * dim) {
    if (!plan.tiles) return;
    scope = std::make_unique<TileScope>(*kernel_set().tiles);
    tile_filter = Buffer<uint16_t>(padded_tile(plan.query_block) * padded_brick(dim));
    tile_chunks = Buffer<uint16_t>(plan.chunk_block * dim);
    tile_packed = Buffer<uint16_t>(padded(plan.chunk_block) * padded_brick(dim));
  }
  int64_t slots;     // k, or the number of chunks if that is smaller
  int64_t capacity;  // candidates per query
  int64_t candidate_stride, best_stride;
  Buffer<A> raw, filter;     // [query_block, E]; filter rows have their largest element in [1, 2)
  Buffer<A> chunks, packed;  // [chunk_block, E] and its transpose, padded with zero columns
  Buffer<A> tile;            // [tile_rows, padded(chunk_block)]
  Buffer<A> scores;          // [query_block, slots], best first
  Buffer<int32_t> indices;
  Buffer<float> best;          // [query_block, best_stride] products, best first
  Buffer<float> products;      // [query_block, candidate_stride] of the candidates
  Buffer<int32_t> candidates;  // the same, chunks ascending
  Buffer<SearchQuery> queries;
  Buffer<A> scored;           // [kScoredTogether, E]
  double largest_chunk_norm;  // so far; NaN chunks count for none
  FilterError error;
  std::unique_ptr<TileScope> scope;
  Buffer<uint16_t> tile_filter, tile_chunks, tile_packed;  // the same as bfloat16
};

// As integers, magnitudes order as the numbers do, NaN above them, and the loop becomes vectors.
inline float largest_magnitude(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    most = std::max(most, bits & 0x7fffffffu);
  }
  float largest;
  std::memcpy(&largest, &most, sizeof(largest));
  return largest;
}

template <class A>
SearchQuery prepare_query(const A* raw, A* filter, int64_t dim, int64_t eligible) {
  SearchQuery query{std::sqrt(kernels<A>().canonical_dot(raw, raw, dim)), 0, true, eligible, 0, 0};
  if constexpr (std::is_same_v<A, float>) {
    const double largest = largest_magnitude(raw, dim);
    if (largest > 0 && std::isfinite(query.norm) && dim <= kLongestFilterRow) {
      const int exponent = std::ilogb(largest);
      const double factor = std::ldexp(1.0, -exponent);
      query.filter_norm = query.norm * factor;
      query.exhaustive = false;
      for (int64_t e = 0; e < dim; ++e) filter[e] = static_cast<float>(raw[e] * factor);
    }
  }
  if (query.exhaustive) std::fill_n(filter, dim, A(0));
  return query;
}

// Loads a tile of chunks, packs its transpose and takes note of the largest norm among them.
template <class A>
void load_chunks(const RetrieveProblem& p, const Task& task, int64_t first, int64_t count,
                 SearchScratch<A>& s) {
  const int64_t dim = p.shape.retrieval_dim;
  const Kernels<A>& kernel = kernels<A>();
  for (int64_t c = 0; c < count; ++c) {
    A* row = s.chunks.data() + c * dim;
    const int64_t chunk = task.sequence->chunk_begin + first + c;
    kernel.load_row(p.chunks.dtype, p.chunks.at(task.sequence->batch, chunk, task.head), row, dim);
    const double norm = std::sqrt(kernel.canonical_dot(row, row, dim));
    if (norm > s.largest_chunk_norm) s.largest_chunk_norm = norm;  // a NaN chunk passes the filter by itself
    if (s.scope != nullptr) kernel.store_row(DType::kBFloat16, row, s.tile_chunks.data() + c * dim, dim);
  }
  if (s.scope != nullptr)
    return kernel_set().tiles->pack_transposed({s.tile_chunks.data(), dim, count, dim}, s.tile_packed.data());
  kernel.transpose(s.chunks.data(), dim, count, dim, s.packed.data());
}

// s.tile = Q C^T for `rows` rows from `row` on, a multiple of 16.
template <class A>
void multiply(int64_t row, int64_t rows, int64_t width, int64_t dim, SearchScratch<A>& s) {
  if constexpr (std::is_same_v<A, float>) {
    if (s.scope != nullptr) {
      const int64_t depth = padded_brick(dim);
      return kernel_set().tiles->gemm({padded_tile(rows), width, depth, s.tile_filter.data() + row * depth,
                                       depth, s.tile_packed.data(), s.tile.data(), width, false});
    }
  }
  kernels<A>().gemm({rows, width, dim, s.filter.data() + row * dim, dim, 1, s.packed.data(), width,
                     s.tile.data(), width, false});
}

template <class A>
void insert(A score, int32_t index, int64_t top_k, SearchQuery& query, A* scores, int32_t* indices) {
  int64_t slot = query.found;
  if (slot == top_k) {
    if (!canonical::later_ranks_above(score, scores[top_k - 1])) return;
    --slot;
  } else {
    ++query.found;
  }
  for (; slot > 0 && canonical::later_ranks_above(score, scores[slot - 1]); --slot) {
    scores[slot] = scores[slot - 1];
    indices[slot] = indices[slot - 1];
  }
  scores[slot] = score;
  indices[slot] = index;
}

// Scores chunks canonically, in ascending order, a few at a time. chunk_of(i) is the i-th.
template <class A, class ChunkOf>
void score(const RetrieveProblem& p, const Task& task, int64_t row, int64_t count, const ChunkOf& chunk_of,
           SearchScratch<A>& s) {
  const int64_t dim = p.shape.retrieval_dim;
  SearchQuery& query = s.queries[row];
  const Kernels<A>& kernel = kernels<A>();
  for (int64_t first = 0; first < count; first += kScoredTogether) {
    const int64_t together = std::min(kScoredTogether, count - first);
    for (int64_t i = 0; i < together; ++i) {
      const int64_t at = task.sequence->chunk_begin + chunk_of(first + i);
      kernel.load_row(p.chunks.dtype, p.chunks.at(task.sequence->batch, at, task.head),
                      s.scored.data() + i * dim, dim);
    }
    double dots[kScoredTogether];
    kernel.canonical_dots(s.raw.data() + row * dim, s.scored.data(), together, dim, dots);
    for (int64_t i = 0; i < together; ++i)
      insert(canonical::score<A>(dots[i], query.norm), static_cast<int32_t>(chunk_of(first + i)), s.slots,
             query, s.scores.data() + row * s.slots, s.indices.data() + row * s.slots);
  }
}

// Whether the filter's bounds hold for the chunks so far.
template <class A>
bool filter_holds(const SearchScratch<A>& s) {
  return s.largest_chunk_norm < (s.scope != nullptr ? 0x1p30 : 0x1p60);
}

// How far below the worst of the best quick products a product must lie to be passed over, at least.
template <class A>
float filter_margin(const SearchQuery& query, const SearchScratch<A>& s) {
  if (!filter_holds(s)) return std::numeric_limits<float>::infinity();
  const double limit = quick_filter_limit(0, query.filter_norm, s.largest_chunk_norm, s.error);
  return static_cast<float>(-limit * (1 + 0x1p-20));
}

// A chunk whose product lies below this cannot be among the best.
template <class A>
float threshold(const SearchQuery& query, const float* best, const SearchScratch<A>& s) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  if (!filter_holds(s)) return kLowest;
  const double limit =
      quick_filter_limit(best[s.slots - 1], query.filter_norm, s.largest_chunk_norm, s.error);
  return std::fabs(limit) <= std::numeric_limits<float>::max() ? static_cast<float>(limit) : kLowest;
}

// Drops the candidates below the threshold; scores the others if that leaves no room, or if they are the
// last.
template <class A>
void refine(const RetrieveProblem& p, const Task& task, int64_t row, int64_t room, SearchScratch<A>& s) {
  SearchQuery& query = s.queries[row];
  float* products = s.products.data() + row * s.candidate_stride;
  int32_t* candidates = s.candidates.data() + row * s.candidate_stride;
  const float bar = threshold(query, s.best.data() + row * s.best_stride, s);
  query.candidates = kernels<float>().drop_below(bar, products, candidates, query.candidates);
  if (query.candidates + room <= s.capacity) return;
  score(p, task, row, query.candidates, [&](int64_t i) { return candidates[i]; }, s);
  query.candidates = 0;
}

// A product among the k best of its row.
template <class A>
void rank(float product, float* best, const SearchScratch<A>& s) {
  int64_t slot = s.slots - 1;
  if (!(product > best[slot])) return;
  for (; slot > 0 && best[slot - 1] < product; --slot) best[slot] = best[slot - 1];
  best[slot] = product;
}

// One query against one tile of chunks [first, first + count), all of them eligible, whose quick products
// are given. Tiles come in ascending order. is_ranked: its products are among those of the list of the best.
template <class A>
void scan_row(const RetrieveProblem& p, const Task& task, int64_t row, int64_t first, int64_t count,
              const A* products, SearchScratch<A>& s, bool is_ranked = false) {
  SearchQuery& query = s.queries[row];
  if constexpr (std::is_same_v<A, float>) {
    if (!query.exhaustive) {
      if (query.candidates + count > s.capacity) refine(p, task, row, count, s);
      const int64_t at = row * s.candidate_stride;
      query.candidates =
          kernels<A>().filter({products, count, static_cast<int32_t>(first), filter_margin(query, s),
                               is_ranked, s.slots, s.best.data() + row * s.best_stride,
                               s.products.data() + at, s.candidates.data() + at, query.candidates});
      return;
    }
  }
  if (query.norm == 0 && query.found == s.slots) return;  // all its scores are 0: the first chunks stay
  score(p, task, row, count, [&](int64_t c) { return first + c; }, s);
}

template <class A>
void load_queries(const RetrieveProblem& p, const Task& task, SearchScratch<A>& s) {
  const int64_t dim = p.shape.retrieval_dim, depth = padded_brick(dim), rows = task.end - task.begin;
  std::fill_n(s.best.data(), rows * s.best_stride, -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < rows; ++i) {
    A* raw = s.raw.data() + i * dim;
    A* filter = s.filter.data() + i * dim;
    kernels<A>().load_row(p.query.dtype, p.query.at(task.sequence->batch, task.begin + i, task.head), raw,
                          dim);
    const int64_t eligible =
        canonical::eligible_chunks(task.sequence->position(task.begin + i), p.shape.chunk_size);
    s.queries[i] = prepare_query(raw, filter, dim, eligible);
    if (s.scope == nullptr) continue;
    uint16_t* tile_row = s.tile_filter.data() + i * depth;
    kernels<A>().store_row(DType::kBFloat16, filter, tile_row, dim);
    std::fill(tile_row + dim, tile_row + depth, uint16_t{0});
  }
}

// The exact search: every chunk in the past of each query.
template <class A>
void search_block(const RetrieveProblem& p, const SearchPlan& plan, const Task& task, SearchScratch<A>& s) {
  const int64_t dim = p.shape.retrieval_dim, rows = task.end - task.begin;
  load_queries(p, task, s);
  s.largest_chunk_norm = 0;
  s.error = s.scope == nullptr ? fp32_error(dim) : tile_error(dim, p.query.dtype != DType::kBFloat16);
  const int64_t last = rows == 0 ? 0 : s.queries[rows - 1].eligible;
  for (int64_t first = 0; first < last; first += plan.chunk_block) {
    const int64_t count = std::min(plan.chunk_block, last - first), width = padded(count);
    load_chunks(p, task, first, count, s);
    // Eligibility grows with the row: the rows that see this tile are the last ones.
    int64_t row = 0;
    while (s.queries[row].eligible <= first) ++row;
    for (int64_t begin = row / 16 * 16; begin < rows; begin += kProductRows) {
      const int64_t end = std::min(begin + kProductRows, rows);
      multiply(begin, end - begin, width, dim, s);
      for (row = std::max(row, begin); row < end; ++row)
        scan_row(p, task, row, first, std::min(count, s.queries[row].eligible - first),
                 s.tile.data() + (row - begin) * width, s);
    }
  }
  const StageScope rescore(Stage::kRescore);
  for (int64_t row = 0; row < rows; ++row) refine(p, task, row, s.capacity + 1, s);
}

// Rows [0, task.end - task.begin) of the scratch into the results.
template <class A>
void write_block(const RetrieveProblem& p, const Task& task, SearchScratch<A>& s) {
  const int64_t top_k = p.shape.top_k;
  for (int64_t i = 0; i < task.end - task.begin; ++i) {
    const int64_t row = (task.sequence->batch * p.shape.queries + task.begin + i) * p.shape.retrieval_heads;
    const int64_t at = (row + task.head) * top_k, found = s.queries[i].found;
    A* scores = static_cast<A*>(p.scores) + at;
    std::copy_n(s.scores.data() + i * s.slots, found, scores);
    std::copy_n(s.indices.data() + i * s.slots, found, p.indices + at);
    std::fill(scores + found, scores + top_k, -std::numeric_limits<A>::infinity());
    std::fill(p.indices + at + found, p.indices + at + top_k, -1);
  }
}

}  // namespace resona::cpu
