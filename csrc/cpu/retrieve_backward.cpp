// Gradients of the scores of the retrieved chunks; the indices are constants.
//
//   score = <q, c> / |q|      d q = g (c - score q / |q|) / |q|      d c = g q / |q|
//
// A task owns a range of queries for d q, a range of chunks for d c; zero-norm queries give zeros.
#include <cmath>

#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/lists.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"
#include "cpu/tasks.h"

namespace resona::cpu {
namespace {

template <class A>
struct Scratch {
  explicit Scratch(int64_t dim) : query(dim), chunk(dim), gradient(dim) {}
  Buffer<A> query, chunk, gradient;
};

int64_t slots_of(const RetrieveBackwardProblem& p, const Sequence& sequence, int64_t query, int64_t head) {
  return ((sequence.batch * p.shape.queries + query) * p.shape.retrieval_heads + head) * p.shape.top_k;
}

// Loads a query row and returns its norm.
template <class A>
double load_query(const RetrieveBackwardProblem& p, const Sequence& sequence, int64_t query, int64_t head,
                  Buffer<A>& to) {
  const int64_t dim = p.shape.retrieval_dim;
  kernels<A>().load_row(p.query.dtype, p.query.at(sequence.batch, query, head), to.data(), dim);
  return std::sqrt(kernels<A>().canonical_dot(to.data(), to.data(), dim));
}

template <class A>
void query_row(const RetrieveBackwardProblem& p, const Task& task, int64_t query, Scratch<A>& s) {
  const Sequence& sequence = *task.sequence;
  const Kernels<A>& kernel = kernels<A>();
  const int64_t dim = p.shape.retrieval_dim, slots = slots_of(p, sequence, query, task.head);
  const double norm = load_query(p, sequence, query, task.head, s.query);
  std::fill_n(s.gradient.data(), dim, A(0));
  for (int64_t slot = 0; slot < p.shape.top_k && norm != 0; ++slot) {
    if (p.indices[slots + slot] < 0) continue;
    const double g = static_cast<const A*>(p.score_gradient)[slots + slot];
    const int64_t chunk = sequence.chunk_begin + p.indices[slots + slot];
    kernel.load_row(p.chunks.dtype, p.chunks.at(sequence.batch, chunk, task.head), s.chunk.data(), dim);
    const double score = kernel.canonical_dot(s.query.data(), s.chunk.data(), dim) / norm;
    kernel.add_scaled(static_cast<A>(g / norm), s.chunk.data(), s.gradient.data(), dim);
    kernel.add_scaled(static_cast<A>(-g * (score / norm) / norm), s.query.data(), s.gradient.data(), dim);
  }
  kernel.store_row(p.query_gradient.dtype, s.gradient.data(),
                   p.query_gradient.at(sequence.batch, query, task.head), dim);
}

template <class A>
void chunk_row(const RetrieveBackwardProblem& p, const Sequence& sequence, int64_t head,
               const ChunkLists& lists, const Run& run, Scratch<A>& s) {
  const int64_t dim = p.shape.retrieval_dim;
  std::fill_n(s.gradient.data(), dim, A(0));
  for (int64_t i = run.begin; i < run.end; ++i) {
    const Entry& entry = lists.entries[i];
    const int64_t query = sequence.query_begin + entry.row;
    const double norm = load_query(p, sequence, query, head, s.query);
    if (norm == 0) continue;
    const double g = static_cast<const A*>(p.score_gradient)[slots_of(p, sequence, query, head) + entry.slot];
    kernels<A>().add_scaled(static_cast<A>(g / norm), s.query.data(), s.gradient.data(), dim);
  }
  kernels<A>().store_row(p.chunk_gradient.dtype, s.gradient.data(),
                         p.chunk_gradient.at(sequence.batch, sequence.chunk_begin + run.chunk, head), dim);
}

template <class A>
void run(const RetrieveBackwardProblem& p, const SearchPlan& plan, const Executor& executor) {
  const Shape& shape = p.shape;
  const auto make_scratch = [&] { return Scratch<A>(shape.retrieval_dim); };
  const auto rows = make_tasks(*p.sequences, shape.retrieval_heads, plan.query_block, query_extent);
  for_each_task(executor, static_cast<int64_t>(rows.size()), make_scratch, [&](Scratch<A>& s, int64_t i) {
    const StageScope gradients(Stage::kGradients);
    for (int64_t query = rows[i].begin; query < rows[i].end; ++query) query_row(p, rows[i], query, s);
  });

  for (const Sequence& sequence : *p.sequences)
    for (int64_t head = 0; head < shape.retrieval_heads; ++head) {
      const ChunkLists lists =
          build_lists(sequence.query_count, shape.top_k, sequence.token_count / shape.chunk_size,
                      [&](int64_t row, int64_t slot) {
                        return p.indices[slots_of(p, sequence, sequence.query_begin + row, head) + slot];
                      });
      const int64_t runs = static_cast<int64_t>(lists.runs.size());
      const int64_t tasks = (runs + plan.chunk_block - 1) / plan.chunk_block;
      for_each_task(executor, tasks, make_scratch, [&](Scratch<A>& s, int64_t i) {
        const StageScope gradients(Stage::kGradients);
        const int64_t end = std::min((i + 1) * plan.chunk_block, runs);
        for (int64_t r = i * plan.chunk_block; r < end; ++r)
          chunk_row(p, sequence, head, lists, lists.runs[r], s);
      });
    }
}

}  // namespace

void retrieve_backward(const RetrieveBackwardProblem& p, const SearchPlan& plan, const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? run<double>(p, plan, executor) : run<float>(p, plan, executor);
}

}  // namespace resona::cpu
