// Attention in bfloat16 on matrix tiles, sums and softmax in float32. Keys and values are packed once per
// chunk. The queries of the range are copied next to one another once per task: gathered from the tensor,
// every row would touch a page of its own again for every chunk that it selected.
#pragma once

#include "common/plan.h"
#include "cpu/attend_tile.h"

namespace resona::cpu {

class TileAttention {
 public:
  using Accumulator = float;

  TileAttention(const AttendProblem& p, const AttendPlan& plan)
      : p_(p), kernel_(*kernel_set().tiles), scope_(kernel_) {
    const Shape& s = p.shape;
    const int64_t rows = std::min(plan.query_range, s.queries) * (s.heads / s.kv_heads);
    const int64_t dim = width(s.head_dim), keys = padded_brick(plan.key_tile);
    queries_ = Buffer<uint16_t>(rows * dim);
    key_ = Buffer<uint16_t>(keys * dim);
    value_ = Buffer<uint16_t>(keys * dim);
    scratch_ = Buffer<TileAttendScratch>(1);
  }

  static int64_t width(int64_t head_dim) { return padded_brick(head_dim); }

  void begin(const Task& task, const ChunkLists& lists) {
    const int64_t group = p_.shape.heads / p_.shape.kv_heads, dim = p_.shape.head_dim;
    uint16_t* to = queries_.data();
    for (int64_t query = task.begin; query < task.end; ++query)
      for (int64_t g = 0; g < group; ++g, to += width(dim)) {
        const void* from = p_.query.at(task.sequence->batch, query, task.head * group + g);
        std::memcpy(to, from, static_cast<size_t>(dim) * 2);
        std::fill(to + dim, to + width(dim), uint16_t{0});
      }
    const int64_t rows = static_cast<int64_t>(lists.entries.size()) * group;
    const RowTile all{task.sequence, lists.entries.data(), task.head, group, task.begin, 0, rows};
    rows_.resize(rows);
    accumulator_rows(all, rows_.data());
    if (p_.bias == nullptr) return;
    bias_.resize(rows);
    gather_bias(p_, all, bias_.data());
  }

  // The chunk after this one: its keys and values are fetched while row tiles are worked on.
  void expect(const Task& task, int64_t chunk) {
    const int64_t token = task.sequence->token_begin + chunk * p_.shape.chunk_size;
    expected_[0] = rows_of(p_.key, task, token, p_.shape.chunk_size);
    expected_[1] = rows_of(p_.value, task, token, p_.shape.chunk_size);
  }

  void load_keys(const Task& task, int64_t token, int64_t count) {
    kernel_.pack_transposed(rows_of(p_.key, task, token, count), key_.data());
    kernel_.pack_rows(rows_of(p_.value, task, token, count), value_.data());
  }

  void attend(const Task&, const ChunkLists&, const Run& run, int64_t key_count, Running<float>& running) {
    const int64_t group = p_.shape.heads / p_.shape.kv_heads, all = static_cast<int64_t>(rows_.size());
    const int64_t first = run.begin * group;
    TileAttend t{};
    t.row_count = run.end * group - first;
    t.key_count = key_count;
    t.dim = width(p_.shape.head_dim);
    t.rows = rows_.data() + first;
    t.rows_known = all - first;
    t.bias = p_.bias == nullptr ? nullptr : bias_.data() + first;
    t.queries = queries_.data();
    t.key = key_.data(), t.value = value_.data();
    t.expected = expected_;
    t.scale = static_cast<float>(p_.scale);
    t.sum = running.sum.data(), t.peak = running.peak.data(), t.total = running.total.data();
    t.scratch = scratch_.data();
    kernel_.attend(t);
  }

  void store(float factor, const float* sum, void* out) const {
    kernel_.store_scaled(factor, sum, static_cast<uint16_t*>(out), p_.shape.head_dim);
  }

 private:
  TileRows rows_of(const Rows& tensor, const Task& task, int64_t token, int64_t count) const {
    return tile_rows(tensor, *task.sequence, task.head, token, count, p_.shape.head_dim);
  }

  const AttendProblem& p_;
  const TileKernels& kernel_;
  TileScope scope_;
  Buffer<uint16_t> queries_;      // of the range
  Buffer<uint16_t> key_, value_;  // of one key tile, packed
  Buffer<TileAttendScratch> scratch_;
  std::vector<int32_t> rows_;  // by list entry and query head of the group: the accumulator
  std::vector<float> bias_;    // the same
  TileRows expected_[2] = {};  // keys and values of the next chunk, as far as they are still to be fetched
};

}  // namespace resona::cpu
