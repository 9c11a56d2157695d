// From a RetrieveProblem to what the kernels of the search read.
#pragma once

#include "common/plan_search_cuda.h"
#include "cuda/search_rows.cuh"

namespace resona::cuda {

template <class T>
SearchOperand<T> search_operand(const Rows& r, int64_t dim) {
  return {static_cast<const T*>(r.data), r.batch_stride, r.token_stride, r.head_stride,
          rows_of_16_bytes(r, dim)};
}

// Of no tiles yet.
inline SearchRows search_rows_of(const Shape& s, const PackedSequences& packed) {
  SearchRows rows{};
  rows.batch = s.batch, rows.queries = s.queries, rows.heads = s.retrieval_heads, rows.dim = s.retrieval_dim;
  rows.context = s.context, rows.chunk_size = s.chunk_size, rows.chunks = s.context / s.chunk_size;
  rows.packed = packed;
  return rows;
}

inline SearchResults search_results(const RetrieveProblem& problem) {
  return {problem.shape.top_k, problem.indices, static_cast<float*>(problem.scores)};
}

template <class T>
SearchParams<T> search_params(const RetrieveProblem& problem, const CudaSearchPlan& plan,
                              const SearchArrays& arrays, const SearchRows& rows) {
  SearchParams<T> p{};
  p.rows = rows;
  p.query = search_operand<T>(problem.query, rows.dim), p.chunk = search_operand<T>(problem.chunks, rows.dim);
  p.norms = arrays.norms;
  p.error = sizeof(T) == 2 ? mma16_error(rows.dim) : tf32x3_error(rows.dim);
  p.results = search_results(problem);
  p.tile_counts = problem.tile_counts, p.count_pitch = static_cast<int>(problem.count_pitch);
  p.splits = static_cast<int>(plan.splits), p.passes = static_cast<int>(plan.passes);
  p.candidates = arrays.candidates, p.cutoffs = arrays.cutoffs, p.tickets = arrays.tickets;
  return p;
}

}  // namespace resona::cuda
