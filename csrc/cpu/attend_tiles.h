// Attention in bfloat16 on matrix tiles, sums and softmax in float32. Keys and values are packed once per
// chunk and range, or once for all ranges of a head where the plan keeps them: read from the tensor, every
// key lies in a page of its own. For the same reason the queries of a range are copied next to one another.
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
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(uint16_t) + sizeof(float));
    spills_ = rows * row_bytes > kernel_.second_cache_bytes / 4 * 3;
    packed_ = Buffer<uint16_t>((padded_tile(plan.key_tile) + keys) * dim);
    scratch_ = Buffer<TileAttendScratch>(1);
    tile_size_ = (padded_tile(plan.key_tile) + keys) * dim;
    key_tile_ = plan.key_tile;
    tiles_per_chunk_ = (s.chunk_size + key_tile_ - 1) / key_tile_;
    if (plan.kept_tiles == 0) return;
    kept_ = Buffer<uint16_t>(plan.kept_tiles * tile_size_);
    is_kept_.resize(plan.kept_tiles);
  }

  static int64_t width(int64_t head_dim) { return padded_brick(head_dim); }

  void begin(const Task& task, const ChunkLists& lists) {
    if (task.sequence != sequence_ || task.head != head_) std::fill(is_kept_.begin(), is_kept_.end(), false);
    sequence_ = task.sequence, head_ = task.head;
    load_queries(task);
    const int64_t group = p_.shape.heads / p_.shape.kv_heads;
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
    if (is_kept_.empty() || !is_kept_[chunk * tiles_per_chunk_]) return;
    const int64_t row = width(p_.shape.head_dim), rows = tiles_per_chunk_ * tile_size_ / row;
    expected_[0] = {kept_.data() + chunk * tiles_per_chunk_ * tile_size_, row, rows, row};
    expected_[1].count = 0;
  }

  void load_keys(const Task& task, int64_t token, int64_t count) {
    const int64_t at = token - task.sequence->token_begin, in_chunk = at % p_.shape.chunk_size;
    const int64_t tile = at / p_.shape.chunk_size * tiles_per_chunk_ + in_chunk / key_tile_;
    uint16_t* key = is_kept_.empty() ? packed_.data() : kept_.data() + tile * tile_size_;
    uint16_t* value = key + padded_tile(key_tile_) * width(p_.shape.head_dim);
    key_ = key, value_ = value;
    if (!is_kept_.empty()) {
      if (is_kept_[tile]) return;
      is_kept_[tile] = true;
    }
    kernel_.pack_transposed(rows_of(p_.key, task, token, count), key);
    kernel_.pack_rows(rows_of(p_.value, task, token, count), value);
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
    t.rows_spill = spills_;
    t.bias = p_.bias == nullptr ? nullptr : bias_.data() + first;
    t.queries = queries_.data();
    t.key = key_, t.value = value_;
    t.expected = expected_;
    t.expected_per_row = (2 * p_.shape.chunk_size + t.row_count - 1) / t.row_count;
    t.scale = static_cast<float>(p_.scale);
    t.sum = running.sum.data(), t.peak = running.peak.data(), t.total = running.total.data();
    t.scratch = scratch_.data();
    kernel_.attend(t);
  }

  void store(float factor, const float* sum, void* out) const {
    kernel_.store_scaled(factor, sum, static_cast<uint16_t*>(out), p_.shape.head_dim);
  }

 private:
  void load_queries(const Task& task) {
    const int64_t group = p_.shape.heads / p_.shape.kv_heads, dim = p_.shape.head_dim;
    const int64_t rows = (task.end - task.begin) * group;
    const auto row_at = [&](int64_t row) {
      return p_.query.at(task.sequence->batch, task.begin + row / group, task.head * group + row % group);
    };
    uint16_t* to = queries_.data();
    for (int64_t row = 0; row < rows; ++row, to += width(dim)) {
      if (row + kRowsAhead < rows) fetch(row_at(row + kRowsAhead), dim * 2);
      std::memcpy(to, row_at(row), static_cast<size_t>(dim) * 2);
      std::fill(to + dim, to + width(dim), uint16_t{0});
    }
  }

  TileRows rows_of(const Rows& tensor, const Task& task, int64_t token, int64_t count) const {
    return tile_rows(tensor, *task.sequence, task.head, token, count, p_.shape.head_dim);
  }

  const AttendProblem& p_;
  const TileKernels& kernel_;
  TileScope scope_;
  Buffer<uint16_t> queries_;  // of the range
  Buffer<uint16_t> packed_;   // keys and values of one key tile
  Buffer<uint16_t> kept_;     // of all key tiles of a head, if the plan wants it
  std::vector<uint8_t> is_kept_;
  const Sequence* sequence_ = nullptr;  // whose are kept
  int64_t head_ = -1;
  int64_t tile_size_, key_tile_, tiles_per_chunk_;
  const uint16_t *key_ = nullptr, *value_ = nullptr;  // in use
  Buffer<TileAttendScratch> scratch_;
  std::vector<int32_t> rows_;  // by list entry and query head of the group: the accumulator
  std::vector<float> bias_;    // the same
  bool spills_;                // queries and accumulators, out of the second cache
  TileRows expected_[2] = {};  // keys and values of the next chunk, as far as they are still to be fetched
};

}  // namespace resona::cpu
