// Attention in the accumulation type, on vector registers: any dtype, any processor.
#pragma once

#include "common/plan.h"
#include "cpu/attend_tile.h"

namespace resona::cpu {

template <class A>
class VectorAttention {
 public:
  using Accumulator = A;

  VectorAttention(const AttendProblem& p, const AttendPlan& plan) : p_(p), row_tile_(plan.row_tile) {
    const int64_t dim = padded(p.shape.head_dim), keys = padded(plan.key_tile);
    key_ = Buffer<A>(keys * dim);
    key_transposed_ = Buffer<A>(keys * dim);
    value_ = Buffer<A>(keys * dim);
    query_ = Buffer<A>(plan.row_tile * dim);
    weight_ = Buffer<A>(plan.row_tile * keys);
    out_ = Buffer<A>(plan.row_tile * dim);
    bias_ = Buffer<A>(plan.row_tile);
    decay_ = Buffer<A>(plan.row_tile);
    rows_ = Buffer<int32_t>(plan.row_tile);
  }

  static int64_t width(int64_t head_dim) { return padded(head_dim); }

  void begin(const Task&, const ChunkLists&) { expected_ = 0; }

  // The chunk after this one: its keys and values are fetched while row tiles are worked on.
  void expect(const Task& task, int64_t chunk) {
    const int64_t token = task.sequence->token_begin + chunk * p_.shape.chunk_size;
    expected_key_ = static_cast<const char*>(p_.key.at(task.sequence->batch, token, task.head));
    expected_value_ = static_cast<const char*>(p_.value.at(task.sequence->batch, token, task.head));
    expected_ = p_.shape.chunk_size;
  }

  void load_keys(const Task& task, int64_t token, int64_t count) {
    const int64_t dim = p_.shape.head_dim;
    load_tokens(p_.key, *task.sequence, task.head, token, count, dim, key_.data());
    transpose_tokens(key_.data(), count, dim, key_transposed_.data());
    load_tokens(p_.value, *task.sequence, task.head, token, count, dim, value_.data());
  }

  void attend(const Task& task, const ChunkLists& lists, const Run& run, int64_t key_count,
              Running<A>& running) {
    const int64_t rows = (run.end - run.begin) * (p_.shape.heads / p_.shape.kv_heads);
    const int64_t tiles = (rows + row_tile_ - 1) / row_tile_ * ((p_.shape.chunk_size - 1) / key_count + 1);
    expected_per_product_ = (p_.shape.chunk_size - 1) / (2 * tiles) + 1;
    for_each_row_tile(lists, run, *task.sequence, task.head, p_.shape.heads / p_.shape.kv_heads, task.begin,
                      row_tile_, [&](const RowTile& tile) { attend_tile(tile, key_count, running); });
  }

  void store(A factor, A* sum, void* out) const {
    for (int64_t d = 0; d < p_.shape.head_dim; ++d) sum[d] *= factor;
    kernels<A>().store_row(p_.out.dtype, sum, out, p_.shape.head_dim);
  }

 private:
  void attend_tile(const RowTile& tile, int64_t key_count, Running<A>& running) {
    const int64_t dim = p_.shape.head_dim, width = padded(dim), keys = padded(key_count);
    const Kernels<A>& kernel = kernels<A>();
    gather_rows(tile, p_.query, dim, query_.data());
    gather_bias(p_, tile, bias_.data());
    accumulator_rows(tile, rows_.data());
    fetch_expected();
    kernel.gemm({tile.count, keys, dim, query_.data(), width, 1, key_transposed_.data(), keys, weight_.data(),
                 keys, false});
    kernel.softmax({tile.count, key_count, keys, weight_.data(), static_cast<A>(p_.scale), bias_.data(),
                    rows_.data(), running.peak.data(), running.total.data(), decay_.data()});
    fetch_expected();
    kernel.gemm({tile.count, width, key_count, weight_.data(), keys, 1, value_.data(), width, out_.data(),
                 width, false});
    for (int64_t i = 0; i < tile.count; ++i)
      kernel.decay_and_add(decay_[i], out_.data() + i * width, running.sum.data() + rows_[i] * width, width);
  }

  // Heads lie apart, each token of one in a page of its own: the processor does not foresee the next. Not all
  // at once: many requests would hold up the work that they are to run beside.
  void fetch_expected() {
    const int64_t bytes = p_.shape.head_dim * size_of(p_.key.dtype);
    for (int64_t i = 0; i < expected_per_product_ && expected_ > 0; ++i, --expected_) {
      for (int64_t b = 0; b < bytes; b += 64) {
        __builtin_prefetch(expected_key_ + b, 0, 2);
        __builtin_prefetch(expected_value_ + b, 0, 2);
      }
      expected_key_ += p_.key.token_stride * size_of(p_.key.dtype);
      expected_value_ += p_.value.token_stride * size_of(p_.value.dtype);
    }
  }

  const AttendProblem& p_;
  const int64_t row_tile_;
  const char *expected_key_ = nullptr, *expected_value_ = nullptr;
  int64_t expected_ = 0, expected_per_product_ = 0;  // tokens
  Buffer<A> key_, key_transposed_, value_;           // of one key tile
  Buffer<A> query_, weight_, out_;                   // of one row tile
  Buffer<A> bias_, decay_;
  Buffer<int32_t> rows_;
};

}  // namespace resona::cpu
