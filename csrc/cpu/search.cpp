// Cosine top-k over the chunks in each query's past, without a [T, C] buffer.
//
//   for each block of queries
//     for each tile of chunks, ascending
//       tile = Q C^T                                    fp32, any order of summation
//       for each query: columns not below its threshold   one vector compare
//         canonical score (fp64, fixed order) -> insert into the row's sorted list
//
// The threshold is the row's k-th canonical score less a proven bound on the error of the fp32 product,
// so a chunk that is passed over cannot belong to the top k: the result is exact on any data. Ties and
// repeated text only mean that more columns are scored canonically.
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/canonical.h"
#include "common/filter.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/stages.h"
#include "cpu/tasks.h"

namespace resona::cpu {
namespace {

template <class A>
struct Query {
  double norm;       // of the raw query, canonical
  double magnitude;  // raw query = filter query * magnitude; a power of two, so thresholds scale exactly
  bool exhaustive;   // the filter says nothing about this row
  int64_t eligible;  // chunks in its past
  int64_t found;     // filled slots
};

template <class A>
struct Scratch {
  Scratch(const SearchPlan& plan, int64_t dim, int64_t slots)
      : slots(slots),
        raw(plan.query_block * dim),
        filter(plan.query_block * dim),
        chunks(plan.chunk_block * dim),
        packed(padded(plan.chunk_block) * dim),
        tile(plan.query_block * padded(plan.chunk_block)),
        scores(plan.query_block * slots),
        indices(plan.query_block * slots),
        columns(plan.chunk_block),
        queries(plan.query_block) {}
  int64_t slots;             // k, or the number of chunks if that is smaller
  Buffer<A> raw, filter;     // [query_block, E]; filter rows have their largest element in [1, 2)
  Buffer<A> chunks, packed;  // [chunk_block, E] and its transpose, padded with zero columns
  Buffer<A> tile;            // [query_block, padded(chunk_block)]
  Buffer<A> scores;          // [query_block, slots], best first
  Buffer<int32_t> indices;
  Buffer<int32_t> columns;
  Buffer<Query<A>> queries;
};

template <class A>
Query<A> prepare_query(const A* raw, A* filter, int64_t dim, int64_t eligible) {
  Query<A> query{std::sqrt(kernels<A>().canonical_dot(raw, raw, dim)), 1.0, true, eligible, 0};
  if constexpr (std::is_same_v<A, float>) {
    double largest = 0;
    for (int64_t e = 0; e < dim; ++e) largest = std::max(largest, std::fabs(static_cast<double>(raw[e])));
    if (largest > 0 && std::isfinite(query.norm)) {
      const int exponent = std::ilogb(largest);
      query.magnitude = std::ldexp(1.0, exponent);
      query.exhaustive = false;
      for (int64_t e = 0; e < dim; ++e)
        filter[e] = static_cast<float>(std::ldexp(static_cast<double>(raw[e]), -exponent));
    }
  }
  if (query.exhaustive) std::fill_n(filter, dim, A(0));
  return query;
}

// Loads a tile of chunks, packs its transpose and returns the largest norm among them; NaN counts for none.
template <class A>
double load_chunks(const RetrieveProblem& p, const Task& task, int64_t first, int64_t count, Scratch<A>& s) {
  const int64_t dim = p.shape.retrieval_dim, width = padded(count);
  double largest = 0;
  for (int64_t c = 0; c < count; ++c) {
    A* row = s.chunks.data() + c * dim;
    const int64_t chunk = task.sequence->chunk_begin + first + c;
    kernels<A>().load_row(p.chunks.dtype, p.chunks.at(task.sequence->batch, chunk, task.head), row, dim);
    for (int64_t e = 0; e < dim; ++e) s.packed[e * width + c] = row[e];
    const double norm = std::sqrt(kernels<A>().canonical_dot(row, row, dim));
    if (norm > largest) largest = norm;  // a NaN chunk passes the filter by itself
  }
  for (int64_t e = 0; e < dim; ++e)
    for (int64_t c = count; c < width; ++c) s.packed[e * width + c] = 0;
  return largest;
}

// A chunk whose fp32 product with the filter query lies below this cannot enter the row's list.
template <class A>
A threshold(const Query<A>& query, A kth_score, double largest_chunk_norm, int64_t dim) {
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  if (query.norm == 0) return -kLowest;  // all its scores are 0: the first chunks stay
  if (query.exhaustive || kth_score != kth_score || !(largest_chunk_norm < 0x1p60) || dim > kLongestFilterRow)
    return kLowest;
  const double norm = query.norm / query.magnitude;
  const double limit =
      filter_limit(static_cast<double>(kth_score), norm, largest_chunk_norm, fp32_error(dim));
  if (limit != limit || std::fabs(limit) > static_cast<double>(std::numeric_limits<A>::max())) return kLowest;
  return static_cast<A>(limit);
}

template <class A>
void insert(A score, int32_t index, int64_t top_k, Query<A>& query, A* scores, int32_t* indices) {
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

// One query against one tile of chunks [first, first + count), all of them eligible.
template <class A>
void scan_row(const RetrieveProblem& p, int64_t row, int64_t first, int64_t count, int64_t width,
              double largest_chunk_norm, Scratch<A>& s) {
  const int64_t dim = p.shape.retrieval_dim, top_k = s.slots;
  Query<A>& query = s.queries[row];
  A* scores = s.scores.data() + row * top_k;
  int32_t* indices = s.indices.data() + row * top_k;
  const A* raw = s.raw.data() + row * dim;
  const A lowest = -std::numeric_limits<A>::infinity();
  const auto limit = [&] {
    return query.found < top_k ? lowest : threshold(query, scores[top_k - 1], largest_chunk_norm, dim);
  };
  const A* products = s.tile.data() + row * width;
  A bar = limit();
  const int64_t hits = kernels<A>().not_below(products, count, bar, s.columns.data());
  for (int64_t h = 0; h < hits; ++h) {
    const int32_t column = s.columns[h];
    if (products[column] < bar) continue;  // the bar has risen since the columns were listed
    const double dot = kernels<A>().canonical_dot(raw, s.chunks.data() + column * dim, dim);
    insert(canonical::score<A>(dot, query.norm), static_cast<int32_t>(first + column), top_k, query, scores,
           indices);
    bar = limit();
  }
}

template <class A>
void search_block(const RetrieveProblem& p, const SearchPlan& plan, const Task& task, Scratch<A>& s) {
  const Sequence& sequence = *task.sequence;
  const int64_t dim = p.shape.retrieval_dim, rows = task.end - task.begin;
  for (int64_t i = 0; i < rows; ++i) {
    A* raw = s.raw.data() + i * dim;
    kernels<A>().load_row(p.query.dtype, p.query.at(sequence.batch, task.begin + i, task.head), raw, dim);
    const int64_t eligible =
        canonical::eligible_chunks(sequence.position(task.begin + i), p.shape.chunk_size);
    s.queries[i] = prepare_query(raw, s.filter.data() + i * dim, dim, eligible);
  }
  const int64_t last = rows == 0 ? 0 : s.queries[rows - 1].eligible;
  for (int64_t first = 0; first < last; first += plan.chunk_block) {
    const int64_t count = std::min(plan.chunk_block, last - first), width = padded(count);
    const double largest = load_chunks(p, task, first, count, s);
    // Eligibility grows with the row: the rows that see this tile are the last ones.
    int64_t row = 0;
    while (s.queries[row].eligible <= first) ++row;
    kernels<A>().gemm({rows - row, width, dim, s.filter.data() + row * dim, dim, 1, s.packed.data(), width,
                       s.tile.data() + row * width, width, false});
    for (; row < rows; ++row)
      scan_row(p, row, first, std::min(count, s.queries[row].eligible - first), width, largest, s);
  }
}

template <class A>
void write_block(const RetrieveProblem& p, const Task& task, Scratch<A>& s) {
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

template <class A>
void search(const RetrieveProblem& p, const SearchPlan& plan, const Executor& executor) {
  const auto tasks = make_tasks(*p.sequences, p.shape.retrieval_heads, plan.query_block, query_extent);
  const int64_t slots = std::min(p.shape.top_k, p.shape.context / p.shape.chunk_size);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()),
      [&] { return Scratch<A>(plan, p.shape.retrieval_dim, slots); },
      [&](Scratch<A>& s, int64_t i) {
        search_block(p, plan, tasks[i], s);
        write_block(p, tasks[i], s);
      });
}

}  // namespace

void retrieve(const RetrieveProblem& p, const SearchPlan& plan, const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? search<double>(p, plan, executor) : search<float>(p, plan, executor);
}

}  // namespace resona::cpu
