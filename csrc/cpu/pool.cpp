// Chunk pooling: the unit-norm sum of each whole chunk, and its gradient.
#include <utility>

#include "common/canonical.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"
#include "cpu/tasks.h"

namespace resona::cpu {
namespace {

template <class A>
struct Scratch {
  explicit Scratch(int64_t dim) : sum(dim), unit(dim), gradient(dim) {}
  Buffer<A> sum, unit, gradient;
};

// Adds the tokens of a chunk in ascending order and returns the norm of the sum.
template <class A>
double sum_chunk(const Rows& context, const Sequence& sequence, int64_t head, int64_t chunk,
                 const Shape& shape, Scratch<A>& s) {
  const Kernels<A>& kernel = kernels<A>();
  const int64_t dim = shape.retrieval_dim, token = sequence.token_begin + chunk * shape.chunk_size;
  const char* first = static_cast<const char*>(context.at(sequence.batch, token, head));
  kernel.sum_rows[static_cast<int>(context.dtype)](first, context.token_stride * size_of(context.dtype),
                                                   shape.chunk_size, dim, s.sum.data());
  return std::sqrt(kernel.canonical_dot(s.sum.data(), s.sum.data(), dim));
}

std::vector<Task> chunk_tasks(const Shape& shape, const std::vector<Sequence>& sequences, int64_t block) {
  return make_tasks(sequences, shape.retrieval_heads, block, [&](const Sequence& s) {
    return std::pair<int64_t, int64_t>(0, s.token_count / shape.chunk_size);
  });
}

template <class A>
void pool(const PoolProblem& p, const PoolPlan& plan, const Executor& executor) {
  const int64_t dim = p.shape.retrieval_dim;
  const auto tasks = chunk_tasks(p.shape, *p.sequences, plan.chunks_per_task);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()), [&] { return Scratch<A>(dim); },
      [&](Scratch<A>& s, int64_t i) {
        const StageScope scope(Stage::kPool);
        const Task& task = tasks[i];
        const Sequence& sequence = *task.sequence;
        for (int64_t chunk = task.begin; chunk < task.end; ++chunk) {
          const double norm = sum_chunk(p.context, sequence, task.head, chunk, p.shape, s);
          for (int64_t e = 0; e < dim; ++e) s.unit[e] = canonical::unit(s.sum[e], norm);
          kernels<A>().store_row(p.chunks.dtype, s.unit.data(),
                                 p.chunks.at(sequence.batch, sequence.chunk_begin + chunk, task.head), dim);
        }
      });
}

// d sum = (g - <g, c> c) / |sum|, the same for every token of the chunk.
template <class A>
void pool_backward(const PoolBackwardProblem& p, const PoolPlan& plan, const Executor& executor) {
  const int64_t dim = p.shape.retrieval_dim;
  const auto tasks = chunk_tasks(p.shape, *p.sequences, plan.chunks_per_task);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()), [&] { return Scratch<A>(dim); },
      [&](Scratch<A>& s, int64_t i) {
        const StageScope scope(Stage::kGradients);
        const Task& task = tasks[i];
        const Sequence& sequence = *task.sequence;
        const Kernels<A>& kernel = kernels<A>();
        for (int64_t chunk = task.begin; chunk < task.end; ++chunk) {
          const double norm = sum_chunk(p.context, sequence, task.head, chunk, p.shape, s);
          if (norm == 0) continue;
          const void* gradient = p.chunk_gradient.at(sequence.batch, sequence.chunk_begin + chunk, task.head);
          kernel.load_row(p.chunk_gradient.dtype, gradient, s.gradient.data(), dim);
          for (int64_t e = 0; e < dim; ++e) s.unit[e] = canonical::unit(s.sum[e], norm);
          const double along = kernel.canonical_dot(s.gradient.data(), s.unit.data(), dim);
          for (int64_t e = 0; e < dim; ++e)
            s.gradient[e] = static_cast<A>((s.gradient[e] - along * s.unit[e]) / norm);
          for (int64_t t = 0; t < p.shape.chunk_size; ++t) {
            const int64_t token = sequence.token_begin + chunk * p.shape.chunk_size + t;
            kernel.store_row(p.context_gradient.dtype, s.gradient.data(),
                             p.context_gradient.at(sequence.batch, token, task.head), dim);
          }
        }
      });
}

}  // namespace

void pool_chunks(const PoolProblem& p, const PoolPlan& plan, const Executor& executor) {
  p.context.dtype == DType::kFloat64 ? pool<double>(p, plan, executor) : pool<float>(p, plan, executor);
}

void pool_chunks_backward(const PoolBackwardProblem& p, const PoolPlan& plan, const Executor& executor) {
  p.context.dtype == DType::kFloat64 ? pool_backward<double>(p, plan, executor)
                                     : pool_backward<float>(p, plan, executor);
}

}  // namespace resona::cpu
