// Gradients of attention, in three passes over the saved indices and log-sum-exp. Weights are recomputed
// in both of the last two passes: that costs two more products per tile, and in return each gradient has
// one owner, so there are no atomics, no partial results, and the same bits for any number of threads.
//
//   delta      per row: <d out, out> - d lse
//   queries    a task owns a range of queries of one retrieval head: factor, d query, d bias
//   chunks     a task owns some chunks of one key/value head: d key, d value
//
//   weight = exp(scale <query, key> + bias - lse) factor
//   d logit = weight (<d out, value> - delta)
//   factor = 1 / sum of exp(...): one, but for the rounding of lse, which a large bias makes coarse
//   d query = scale d logit key     d key = scale d logit^T query     d value = weight^T d out
#include <cmath>
#include <memory>

#include "cpu/attend_backward_tiles.h"
#include "cpu/attend_tile.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

// The lists of one pass over chunks are held for as many sequences as fit; a single one may exceed it.
constexpr int64_t kListBytes = 256 << 20;

// Elements from row to row of what is as wide as a head.
int64_t row_width(const Shape& s, const AttendPlan& plan) {
  return plan.tiles ? padded_brick(s.head_dim) : padded(s.head_dim);
}

template <class A>
struct Scratch {
  Scratch(const Shape& s, const AttendPlan& plan, int64_t accumulator_rows, bool with_bias) {
    const int64_t dim = row_width(s, plan), keys = padded(plan.key_tile), rows = plan.row_tile;
    if (plan.tiles) tiles = std::make_unique<TileBackward>(s, plan);
    accumulator = Buffer<A>(accumulator_rows * dim);
    total = Buffer<A>(accumulator_rows);
    bias_gradient = Buffer<A>(with_bias ? accumulator_rows * s.top_k : 0);
    for (Buffer<A>* keys_by_dim :
         {&key, &key_transposed, &value, &value_transposed, &key_gradient, &value_gradient})
      *keys_by_dim = Buffer<A>(keys * dim);
    for (Buffer<A>* rows_by_dim : {&query, &out_gradient, &product}) *rows_by_dim = Buffer<A>(rows * dim);
    for (Buffer<A>* rows_by_keys : {&weight, &logit_gradient}) *rows_by_keys = Buffer<A>(rows * keys);
    for (Buffer<A>* per_row : {&bias, &lse, &factor, &delta, &weight_sum, &gradient_sum})
      *per_row = Buffer<A>(rows);
  }
  Buffer<A> accumulator;                                   // d query of one range, [queries, G, D]
  Buffer<A> total, bias_gradient;                          // of one range, [queries, G] and [queries, G, k]
  Buffer<A> key, key_transposed, value, value_transposed;  // of one key tile
  Buffer<A> key_gradient, value_gradient;                  // of one key tile
  Buffer<A> query, out_gradient, product;                  // of one row tile
  Buffer<A> weight, logit_gradient;                        // [row_tile, key_tile]
  Buffer<A> bias, lse, factor, delta, weight_sum, gradient_sum;  // [row_tile]
  std::unique_ptr<TileBackward> tiles;                           // null: products in the accumulation type
};

template <class A>
struct Pass {
  const AttendBackwardProblem& p;
  const AttendPlan& plan;
  const A* delta;  // [B, T, H]
  A* factor;       // [B, T, H], written by the pass over queries
  bool in_query_pass;

  const Shape& shape() const { return p.forward.shape; }
  int64_t group() const { return shape().heads / shape().kv_heads; }
  int64_t width() const { return row_width(shape(), plan); }
};

template <class A>
void load_key_tile(const Pass<A>& pass, const Sequence& sequence, int64_t kv_head, int64_t token,
                   int64_t count, Scratch<A>& s) {
  const int64_t dim = pass.shape().head_dim;
  if (s.tiles != nullptr) {
    const TileRows key = tile_rows(pass.p.forward.key, sequence, kv_head, token, count, dim);
    const TileRows value = tile_rows(pass.p.forward.value, sequence, kv_head, token, count, dim);
    return pass.in_query_pass ? s.tiles->load_keys(key, value) : s.tiles->load_keys_as_rows(key, value);
  }
  load_tokens(pass.p.forward.key, sequence, kv_head, token, count, dim, s.key.data());
  transpose_tokens(s.key.data(), count, dim, s.key_transposed.data());
  load_tokens(pass.p.forward.value, sequence, kv_head, token, count, dim, s.value.data());
  transpose_tokens(s.value.data(), count, dim, s.value_transposed.data());
}

template <class A>
void load_row_tile(const Pass<A>& pass, const RowTile& tile, Scratch<A>& s) {
  const AttendProblem& f = pass.p.forward;
  const int64_t dim = pass.shape().head_dim;
  if (s.tiles != nullptr) {
    s.tiles->load_rows(tile, f.query, pass.p.out_gradient);
  } else {
    gather_rows(tile, f.query, dim, s.query.data());
    gather_rows(tile, pass.p.out_gradient, dim, s.out_gradient.data());
  }
  gather_bias(f, tile, s.bias.data());
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t at = head_offset(pass.shape(), tile.sequence->batch, tile.query(i), tile.head(i));
    s.lse[i] = static_cast<const A*>(f.lse)[at];
    s.delta[i] = pass.delta[at];
    s.factor[i] = pass.in_query_pass ? A(1) : pass.factor[at];
  }
}

// Fills s.weight, s.logit_gradient, s.weight_sum and s.gradient_sum for one tile.
template <class A>
void recompute(const Pass<A>& pass, const RowTile& tile, int64_t key_count, Scratch<A>& s) {
  const int64_t dim = pass.shape().head_dim, width = pass.width(), keys = padded(key_count);
  const Kernels<A>& kernel = kernels<A>();
  bool multiplied = false;
  if constexpr (std::is_same_v<A, float>) {
    multiplied = s.tiles != nullptr;
    if (multiplied)
      s.tiles->multiply_rows(tile.count, key_count, keys, s.weight.data(), s.logit_gradient.data());
  }
  if (!multiplied) {
    kernel.gemm({tile.count, keys, dim, s.query.data(), width, 1, s.key_transposed.data(), keys,
                 s.weight.data(), keys, false});
    kernel.gemm({tile.count, keys, dim, s.out_gradient.data(), width, 1, s.value_transposed.data(), keys,
                 s.logit_gradient.data(), keys, false});
  }
  kernel.softmax_backward({tile.count, key_count, keys, s.weight.data(), s.logit_gradient.data(),
                           static_cast<A>(pass.p.forward.scale), s.bias.data(), s.lse.data(), s.factor.data(),
                           s.delta.data(), s.weight_sum.data(), s.gradient_sum.data()});
}

// s.product = d logit times keys.
template <class A>
void query_products(const Pass<A>& pass, const RowTile& tile, int64_t key_count, Scratch<A>& s) {
  const int64_t width = pass.width(), keys = padded(key_count);
  load_row_tile(pass, tile, s);
  recompute(pass, tile, key_count, s);
  if constexpr (std::is_same_v<A, float>)
    if (s.tiles != nullptr)
      return s.tiles->query_gradient(s.logit_gradient.data(), tile.count, key_count, keys, s.product.data());
  kernels<A>().gemm({tile.count, width, key_count, s.logit_gradient.data(), keys, 1, s.key.data(), width,
                     s.product.data(), width, false});
}

// Adds weight^T d out to s.value_gradient and d logit^T query to s.key_gradient.
template <class A>
void chunk_products(const Pass<A>& pass, const RowTile& tile, int64_t key_count, Scratch<A>& s) {
  const int64_t width = pass.width(), keys = padded(key_count);
  load_row_tile(pass, tile, s);
  if constexpr (std::is_same_v<A, float>)
    if (s.tiles != nullptr) {
      TileColumns values{};
      values.scale = static_cast<float>(pass.p.forward.scale);
      values.bias = s.bias.data(), values.lse = s.lse.data();
      values.factor = s.factor.data(), values.delta = s.delta.data();
      return s.tiles->add_chunk_gradients(tile.count, key_count, values, s.key_gradient.data(),
                                          s.value_gradient.data());
    }
  recompute(pass, tile, key_count, s);
  const Kernels<A>& kernel = kernels<A>();
  kernel.gemm({key_count, width, tile.count, s.weight.data(), 1, keys, s.out_gradient.data(), width,
               s.value_gradient.data(), width, true});
  kernel.gemm({key_count, width, tile.count, s.logit_gradient.data(), 1, keys, s.query.data(), width,
               s.key_gradient.data(), width, true});
}

template <class A>
void compute_delta(const AttendBackwardProblem& p, A* delta, const Executor& executor) {
  const Shape& s = p.forward.shape;
  constexpr int64_t kBlock = 256;
  const auto tasks = make_tasks(*p.forward.sequences, s.heads, kBlock, query_extent);
  const Rows out{p.forward.out.data, p.forward.out.batch_stride, p.forward.out.token_stride,
                 p.forward.out.head_stride, p.forward.out.dtype};
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()), [&] { return Buffer<A>(2 * s.head_dim); },
      [&](Buffer<A>& row, int64_t i) {
        const StageScope gradients(Stage::kGradients);
        const Task& task = tasks[i];
        const int64_t batch = task.sequence->batch;
        for (int64_t query = task.begin; query < task.end; ++query) {
          A* a = row.data();
          A* b = a + s.head_dim;
          kernels<A>().load_row(out.dtype, out.at(batch, query, task.head), a, s.head_dim);
          kernels<A>().load_row(p.out_gradient.dtype, p.out_gradient.at(batch, query, task.head), b,
                                s.head_dim);
          const int64_t at = head_offset(s, batch, query, task.head);
          const A lse = p.lse_gradient == nullptr ? A(0) : static_cast<const A*>(p.lse_gradient)[at];
          delta[at] = static_cast<A>(kernels<A>().canonical_dot(a, b, s.head_dim)) - lse;
        }
      });
}

// d sink = -sum over rows of exp(sink - lse) delta, in row order.
template <class A>
void sink_gradient(const AttendBackwardProblem& p, const A* delta, const A* factor,
                   const Executor& executor) {
  const Shape& s = p.forward.shape;
  const A* lse = static_cast<const A*>(p.forward.lse);
  for_each_task(
      executor, s.heads, [] { return 0; },
      [&](int, int64_t head) {
        const A sink = static_cast<const A*>(p.forward.sink)[head];
        double sum = 0;
        for (int64_t row = 0; row < s.batch * s.queries; ++row) {
          const int64_t at = row * s.heads + head;
          if (sink != -std::numeric_limits<A>::infinity())
            sum -= std::exp(static_cast<double>(sink) - lse[at]) * factor[at] * delta[at];
        }
        static_cast<A*>(p.sink_gradient)[head] = static_cast<A>(sum);
      });
}

// d query and d bias of one chunk's rows.
template <class A>
void query_pass_chunk(const Pass<A>& pass, const Task& task, int64_t kv_head, const ChunkLists& lists,
                      const Run& run, Scratch<A>& s) {
  const Shape& shape = pass.shape();
  const int64_t width = pass.width();
  const Kernels<A>& kernel = kernels<A>();
  for (int64_t first = 0; first < shape.chunk_size; first += pass.plan.key_tile) {
    const int64_t count = std::min(pass.plan.key_tile, shape.chunk_size - first);
    const int64_t token = task.sequence->token_begin + run.chunk * shape.chunk_size + first;
    load_key_tile(pass, *task.sequence, kv_head, token, count, s);
    for_each_row_tile(lists, run, *task.sequence, kv_head, pass.group(), task.begin, pass.plan.row_tile,
                      [&](const RowTile& tile) {
                        query_products(pass, tile, count, s);
                        for (int64_t i = 0; i < tile.count; ++i) {
                          const int64_t row = tile.accumulator(i);
                          kernel.add_scaled(static_cast<A>(pass.p.forward.scale),
                                            s.product.data() + i * width, s.accumulator.data() + row * width,
                                            width);
                          s.total[row] += s.weight_sum[i];
                          if (pass.p.bias_gradient != nullptr)
                            s.bias_gradient[row * shape.top_k + tile.entry(i).slot] += s.gradient_sum[i];
                        }
                      });
  }
}

// Divides by the sum of the weights and writes one row; the heads of a group share the bias.
template <class A>
void finish_query_row(const Pass<A>& pass, int64_t batch, int64_t query, int64_t head, int64_t row,
                      int64_t retrieval_head, Scratch<A>& s) {
  const AttendProblem& f = pass.p.forward;
  const Shape& shape = pass.shape();
  const int64_t at = head_offset(shape, batch, query, head), width = pass.width();
  const A lse = static_cast<const A*>(f.lse)[at], minus_infinity = -std::numeric_limits<A>::infinity();
  const A sink = f.sink == nullptr ? minus_infinity : static_cast<const A*>(f.sink)[head];
  const A total = s.total[row] + (sink == minus_infinity ? A(0) : std::exp(sink - lse));
  const A factor = total == 0 ? A(0) : 1 / total;
  pass.factor[at] = factor;
  A* accumulator = s.accumulator.data() + row * width;
  for (int64_t d = 0; d < shape.head_dim; ++d) accumulator[d] *= factor;
  kernels<A>().store_row(pass.p.query_gradient.dtype, accumulator,
                         pass.p.query_gradient.at(batch, query, head), shape.head_dim);
  if (pass.p.bias_gradient == nullptr) return;
  A* to = static_cast<A*>(pass.p.bias_gradient) + slot_offset(shape, batch, query, retrieval_head);
  const A* from = s.bias_gradient.data() + row * shape.top_k;
  for (int64_t slot = 0; slot < shape.top_k; ++slot)
    if (from[slot] != 0) to[slot] += factor * from[slot];  // a NaN factor must not reach unused slots
}

template <class A>
void query_pass_task(const Pass<A>& pass, const Task& task, Scratch<A>& s) {
  const Shape& shape = pass.shape();
  const int64_t group = pass.group(), batch = task.sequence->batch;
  const int64_t rows = (task.end - task.begin) * group, share = shape.kv_heads / shape.retrieval_heads;
  const ChunkLists lists =
      selection_lists<A>(pass.p.forward, *task.sequence, task.head, task.begin, task.end);
  for (int64_t kv_head = task.head * share; kv_head < (task.head + 1) * share; ++kv_head) {
    std::fill_n(s.accumulator.data(), rows * pass.width(), A(0));
    std::fill_n(s.total.data(), rows, A(0));
    if (pass.p.bias_gradient != nullptr) std::fill_n(s.bias_gradient.data(), rows * shape.top_k, A(0));
    for (const Run& run : lists.runs) query_pass_chunk(pass, task, kv_head, lists, run, s);
    for (int64_t row = 0; row < rows; ++row)
      finish_query_row(pass, batch, task.begin + row / group, kv_head * group + row % group, row, task.head,
                       s);
  }
}

template <class A>
void query_pass(const Pass<A>& pass, const Executor& executor) {
  const Shape& shape = pass.shape();
  const int64_t rows = std::min(pass.plan.query_range, shape.queries) * pass.group();
  const auto tasks =
      make_tasks(*pass.p.forward.sequences, shape.retrieval_heads, pass.plan.query_range, query_extent);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()),
      [&] { return Scratch<A>(shape, pass.plan, rows, pass.p.bias_gradient != nullptr); },
      [&](Scratch<A>& s, int64_t i) {
        const StageScope gradients(Stage::kGradients);
        query_pass_task(pass, tasks[i], s);
      });
}

template <class A>
void store_key_tile(const MutableRows& to, const Sequence& sequence, int64_t kv_head, int64_t token,
                    int64_t count, int64_t dim, int64_t width, const A* from) {
  for (int64_t t = 0; t < count; ++t)
    kernels<A>().store_row(to.dtype, from + t * width, to.at(sequence.batch, token + t, kv_head), dim);
}

// d key and d value of one chunk.
template <class A>
void chunk_pass_run(const Pass<A>& pass, const Sequence& sequence, int64_t kv_head, const ChunkLists& lists,
                    const Run& run, Scratch<A>& s) {
  const Shape& shape = pass.shape();
  const int64_t dim = shape.head_dim, width = pass.width();
  for (int64_t first = 0; first < shape.chunk_size; first += pass.plan.key_tile) {
    const int64_t count = std::min(pass.plan.key_tile, shape.chunk_size - first);
    const int64_t token = sequence.token_begin + run.chunk * shape.chunk_size + first;
    load_key_tile(pass, sequence, kv_head, token, count, s);
    std::fill_n(s.key_gradient.data(), count * width, A(0));
    std::fill_n(s.value_gradient.data(), count * width, A(0));
    for_each_row_tile(lists, run, sequence, kv_head, pass.group(), sequence.query_begin, pass.plan.row_tile,
                      [&](const RowTile& tile) { chunk_products(pass, tile, count, s); });
    for (int64_t i = 0; i < count * width; ++i) s.key_gradient[i] *= static_cast<A>(pass.p.forward.scale);
    store_key_tile(pass.p.key_gradient, sequence, kv_head, token, count, dim, width, s.key_gradient.data());
    store_key_tile(pass.p.value_gradient, sequence, kv_head, token, count, dim, width,
                   s.value_gradient.data());
  }
}

struct SequenceLists {
  const Sequence* sequence;
  int64_t retrieval_head;
  ChunkLists lists;
};

template <class A>
void chunk_pass_slab(const Pass<A>& pass, std::vector<SequenceLists>& slab, const Executor& executor) {
  const Shape& shape = pass.shape();
  for_each_task(
      executor, static_cast<int64_t>(slab.size()), [] { return 0; },
      [&](int, int64_t i) {
        const Sequence& sequence = *slab[i].sequence;
        slab[i].lists = selection_lists<A>(pass.p.forward, sequence, slab[i].retrieval_head,
                                           sequence.query_begin, sequence.query_begin + sequence.query_count);
      });
  struct RunTask {
    const SequenceLists* owner;
    int64_t kv_head, begin, end;  // runs
  };
  std::vector<RunTask> tasks;
  const int64_t share = shape.kv_heads / shape.retrieval_heads;
  for (const SequenceLists& owner : slab) {
    const int64_t runs = static_cast<int64_t>(owner.lists.runs.size());
    for (int64_t begin = runs; begin > 0; begin -= std::min(begin, pass.plan.list_chunks))  // long lists last
      for (int64_t h = 0; h < share; ++h)
        tasks.push_back({&owner, owner.retrieval_head * share + h,
                         std::max<int64_t>(0, begin - pass.plan.list_chunks), begin});
  }
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()), [&] { return Scratch<A>(shape, pass.plan, 0, false); },
      [&](Scratch<A>& s, int64_t i) {
        const StageScope gradients(Stage::kGradients);
        const RunTask& task = tasks[i];
        for (int64_t run = task.begin; run < task.end; ++run)
          chunk_pass_run(pass, *task.owner->sequence, task.kv_head, task.owner->lists,
                         task.owner->lists.runs[run], s);
      });
}

template <class A>
void chunk_pass(const Pass<A>& pass, const Executor& executor) {
  const Shape& shape = pass.shape();
  std::vector<SequenceLists> slab;
  int64_t bytes = 0;
  for (const Sequence& sequence : *pass.p.forward.sequences)
    for (int64_t head = 0; head < shape.retrieval_heads; ++head) {
      const int64_t more = sequence.query_count * shape.top_k * static_cast<int64_t>(2 * sizeof(Entry));
      if (!slab.empty() && bytes + more > kListBytes) {
        chunk_pass_slab(pass, slab, executor);
        slab.clear();
        bytes = 0;
      }
      slab.push_back({&sequence, head, {}});
      bytes += more;
    }
  if (!slab.empty()) chunk_pass_slab(pass, slab, executor);
}

template <class A>
void run(const AttendBackwardProblem& p, const AttendPlan& plan, const Executor& executor) {
  const Shape& s = p.forward.shape;
  const int64_t rows = s.batch * s.queries * s.heads;
  Buffer<A> delta(rows), factor(rows);
  compute_delta(p, delta.data(), executor);
  query_pass(Pass<A>{p, plan, delta.data(), factor.data(), true}, executor);
  if (p.sink_gradient != nullptr) sink_gradient(p, delta.data(), factor.data(), executor);
  chunk_pass(Pass<A>{p, plan, delta.data(), factor.data(), false}, executor);
}

}  // namespace

void attend_backward(const AttendBackwardProblem& p, const AttendPlan& plan, const Executor& executor) {
  p.forward.query.dtype == DType::kFloat64 ? run<double>(p, plan, executor) : run<float>(p, plan, executor);
}

}  // namespace resona::cpu
