// Attention over the selected chunks, chunk-stationary.
//
//   for each range of queries and key/value head
//     turn the selection around: chunk -> the rows that selected it
//     for each chunk, ascending
//       pack K^T and V once
//       for each tile of its rows: S = Q K^T, softmax against the running peak, O = P V,
//                                  accumulator[row] = decay * accumulator[row] + O
//     divide, add the sink, write
//
// A row meets its chunks in ascending order whatever the ranges and tiles, so results do not depend on
// them or on the number of threads. Accumulators are fp32 and stay in the task's scratch: there are no
// partial results in memory.
#include <cmath>

#include "cpu/attend_tile.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

template <class A>
struct Scratch {
  Scratch(const Shape& s, const AttendPlan& plan) {
    const int64_t group = s.heads / s.kv_heads, dim = padded(s.head_dim), keys = padded(plan.key_tile);
    const int64_t rows = std::min(plan.query_range, s.queries) * group;
    accumulator = Buffer<A>(rows * dim);
    peak = Buffer<A>(rows);
    total = Buffer<A>(rows);
    key = Buffer<A>(keys * dim);
    key_transposed = Buffer<A>(keys * dim);
    value = Buffer<A>(keys * dim);
    query = Buffer<A>(plan.row_tile * dim);
    weight = Buffer<A>(plan.row_tile * keys);
    out = Buffer<A>(plan.row_tile * dim);
    bias = Buffer<A>(plan.row_tile);
    decay = Buffer<A>(plan.row_tile);
    rows_of_tile = Buffer<int32_t>(plan.row_tile);
  }
  Buffer<A> accumulator;                 // [queries of the range, G, padded(D)]
  Buffer<A> peak, total;                 // [queries of the range, G]
  Buffer<A> key, key_transposed, value;  // of one key tile
  Buffer<A> query, weight, out;          // of one row tile
  Buffer<A> bias, decay;
  Buffer<int32_t> rows_of_tile;
};

template <class A>
void attend_rows(const AttendProblem& p, const RowTile& tile, int64_t key_count, Scratch<A>& s) {
  const int64_t dim = p.shape.head_dim, width = padded(dim), keys = padded(key_count);
  const Kernels<A>& kernel = kernels<A>();
  gather_rows(tile, p.query, dim, s.query.data());
  gather_bias(p, tile, s.bias.data());
  for (int64_t i = 0; i < tile.count; ++i) s.rows_of_tile[i] = static_cast<int32_t>(tile.accumulator(i));
  kernel.gemm({tile.count, keys, dim, s.query.data(), width, 1, s.key_transposed.data(), keys,
               s.weight.data(), keys, false});
  kernel.softmax({tile.count, key_count, keys, s.weight.data(), static_cast<A>(p.scale), s.bias.data(),
                  s.rows_of_tile.data(), s.peak.data(), s.total.data(), s.decay.data()});
  kernel.gemm({tile.count, width, key_count, s.weight.data(), keys, 1, s.value.data(), width, s.out.data(),
               width, false});
  for (int64_t i = 0; i < tile.count; ++i)
    kernel.decay_and_add(s.decay[i], s.out.data() + i * width,
                         s.accumulator.data() + s.rows_of_tile[i] * width, width);
}

template <class A>
void attend_chunk(const AttendProblem& p, const AttendPlan& plan, const Task& task, const ChunkLists& lists,
                  const Run& run, Scratch<A>& s) {
  const Sequence& sequence = *task.sequence;
  const int64_t dim = p.shape.head_dim, group = p.shape.heads / p.shape.kv_heads;
  for (int64_t first = 0; first < p.shape.chunk_size; first += plan.key_tile) {
    const int64_t count = std::min(plan.key_tile, p.shape.chunk_size - first);
    const int64_t token = sequence.token_begin + run.chunk * p.shape.chunk_size + first;
    load_tokens(p.key, sequence, task.head, token, count, dim, s.key.data());
    transpose_tokens(s.key.data(), count, dim, s.key_transposed.data());
    load_tokens(p.value, sequence, task.head, token, count, dim, s.value.data());
    for_each_row_tile(lists, run, sequence, task.head, group, task.begin, plan.row_tile,
                      [&](const RowTile& tile) { attend_rows(p, tile, count, s); });
  }
}

// Adds the sink, divides and writes one row.
template <class A>
void finish_row(const AttendProblem& p, int64_t batch, int64_t query, int64_t head, A peak, A total,
                A* accumulator) {
  const A minus_infinity = -std::numeric_limits<A>::infinity();
  const A sink = p.sink == nullptr ? minus_infinity : static_cast<const A*>(p.sink)[head];
  const A top = sink > peak ? sink : peak;
  const A reference = top == minus_infinity ? A(0) : top;
  const A decay = std::exp(peak - reference);
  const A sum = total * decay + std::exp(sink - reference);
  const bool nothing = sum == 0;
  const A factor = nothing ? A(0) : decay / sum;
  for (int64_t d = 0; d < p.shape.head_dim; ++d) accumulator[d] = nothing ? A(0) : accumulator[d] * factor;
  kernels<A>().store_row(p.out.dtype, accumulator, p.out.at(batch, query, head), p.shape.head_dim);
  static_cast<A*>(p.lse)[head_offset(p.shape, batch, query, head)] =
      nothing ? minus_infinity : reference + std::log(sum);
}

template <class A>
void attend_task(const AttendProblem& p, const AttendPlan& plan, const Task& task, Scratch<A>& s) {
  const int64_t group = p.shape.heads / p.shape.kv_heads, width = padded(p.shape.head_dim);
  const int64_t rows = (task.end - task.begin) * group;
  std::fill_n(s.accumulator.data(), rows * width, A(0));
  std::fill_n(s.peak.data(), rows, -std::numeric_limits<A>::infinity());
  std::fill_n(s.total.data(), rows, A(0));
  const ChunkLists lists =
      selection_lists<A>(p, *task.sequence, retrieval_head_of(p.shape, task.head), task.begin, task.end);
  for (const Run& run : lists.runs) attend_chunk(p, plan, task, lists, run, s);
  for (int64_t row = 0; row < rows; ++row)
    finish_row(p, task.sequence->batch, task.begin + row / group, task.head * group + row % group,
               s.peak[row], s.total[row], s.accumulator.data() + row * width);
}

template <class A>
void run(const AttendProblem& p, const AttendPlan& plan, const Executor& executor) {
  const auto tasks = make_tasks(*p.sequences, p.shape.kv_heads, plan.query_range, query_extent);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()), [&] { return Scratch<A>(p.shape, plan); },
      [&](Scratch<A>& s, int64_t i) { attend_task(p, plan, tasks[i], s); });
}

}  // namespace

void attend(const AttendProblem& p, const AttendPlan& plan, const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? run<double>(p, plan, executor) : run<float>(p, plan, executor);
}

}  // namespace resona::cpu
