// Attention over the selected chunks, query-stationary: where a chunk meets few rows, packing it and carrying
// accumulators from chunk to chunk would cost more than reading its keys and values for each of them.
//
//   for each range of queries, and all heads of a selection where that leaves work for every thread
//     for each query, each head: logit = <query, key>, softmax, out = weight value
//                                fetch the same of the query after next
//
// Keys and values of a token lie in rows of [Hkv, D], so its heads are read one after another. A row is done
// at once: no lists, no accumulators, and the output is written from its beginning to its end.
#include "cpu/attend_finish.h"
#include "cpu/attend_tile.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

constexpr int64_t kAhead = 2;  // queries

template <class A>
struct Scratch {
  Scratch(const Shape& s, int64_t slots)
      : chunks(slots), query(s.head_dim), weight(slots * s.chunk_size + 16), sum(s.head_dim) {}
  std::vector<typename RowAttend<A>::Chunk> chunks;  // of one query
  Buffer<A> query, weight, sum;
};

void fetch_rows(const char* row, int64_t stride, int64_t rows, int64_t bytes) {
  for (int64_t i = 0; i < rows; ++i, row += stride) fetch(row, bytes);
}

template <class A>
class RowAttention {
 public:
  RowAttention(const AttendProblem& p, const Task& task, int64_t retrieval_head, Scratch<A>& scratch)
      : p_(p), task_(task), retrieval_head_(retrieval_head), s_(scratch) {}

  // Key/value heads [begin, end), which share a selection.
  void attend(int64_t query, int64_t begin, int64_t end) {
    const int64_t group = p_.shape.heads / p_.shape.kv_heads;
    const int64_t chunks = select(query);
    for (int64_t kv_head = begin; kv_head < end; ++kv_head) {
      if (query + kAhead < task_.end) fetch_ahead(query + kAhead, kv_head);
      for (int64_t g = 0; g < group; ++g) attend_head(query, kv_head * group + g, kv_head, chunks);
    }
  }

 private:
  // The chunks of a query, without the slots that do not count.
  int64_t select(int64_t query) {
    const int64_t slots = slot_offset(p_.shape, task_.sequence->batch, query, retrieval_head_);
    int64_t count = 0;
    for (int64_t slot = 0; slot < p_.shape.top_k; ++slot) {
      const int32_t chunk = p_.indices[slots + slot];
      if (chunk < 0) continue;
      const A bias = bias_at<A>(p_, slots + slot, retrieval_head_);
      if (bias != -std::numeric_limits<A>::infinity())
        s_.chunks[count++] = {chunk * p_.shape.chunk_size, bias};
    }
    return count;
  }

  const char* rows_of(const Rows& tensor, int64_t kv_head) const {
    return static_cast<const char*>(tensor.at(task_.sequence->batch, task_.sequence->token_begin, kv_head));
  }

  // Tokens of one head lie a page apart: the processor does not foresee the next.
  void fetch_ahead(int64_t query, int64_t kv_head) const {
    const int32_t* chunk = p_.indices + slot_offset(p_.shape, task_.sequence->batch, query, retrieval_head_);
    const int64_t row = size_of(p_.key.dtype), bytes = p_.shape.head_dim * row;
    const int64_t key = p_.key.token_stride * row, value = p_.value.token_stride * row;
    for (int64_t slot = 0; slot < p_.shape.top_k; ++slot) {
      if (chunk[slot] < 0) continue;
      const int64_t token = chunk[slot] * p_.shape.chunk_size;
      fetch_rows(rows_of(p_.key, kv_head) + token * key, key, p_.shape.chunk_size, bytes);
      fetch_rows(rows_of(p_.value, kv_head) + token * value, value, p_.shape.chunk_size, bytes);
    }
  }

  void attend_head(int64_t query, int64_t head, int64_t kv_head, int64_t chunks) {
    const Kernels<A>& kernel = kernels<A>();
    const int64_t batch = task_.sequence->batch, dim = p_.shape.head_dim;
    const int type = static_cast<int>(p_.key.dtype);
    A peak = -std::numeric_limits<A>::infinity(), total = 0;
    if (chunks == 0) {
      std::fill_n(s_.sum.data(), dim, A(0));
    } else {
      kernel.load_row(p_.query.dtype, p_.query.at(batch, query, head), s_.query.data(), dim);
      kernel.attend_row[type]({s_.chunks.data(), chunks, p_.shape.chunk_size, dim, s_.query.data(),
                               rows_of(p_.key, kv_head), rows_of(p_.value, kv_head),
                               p_.key.token_stride * size_of(p_.key.dtype),
                               p_.value.token_stride * size_of(p_.value.dtype), static_cast<A>(p_.scale),
                               s_.weight.data(), s_.sum.data(), &peak, &total});
    }
    finish_row(p_, batch, query, head, peak, total, s_.sum.data(), [&](A factor, A* sum, void* out) {
      for (int64_t d = 0; d < dim; ++d) sum[d] *= factor;
      kernel.store_row(p_.out.dtype, sum, out, dim);
    });
  }

  const AttendProblem& p_;
  const Task& task_;
  const int64_t retrieval_head_;
  Scratch<A>& s_;
};

template <class A>
void run(const AttendProblem& p, const AttendPlan& plan, const Executor& executor) {
  const Shape& s = p.shape;
  const int64_t shared = s.kv_heads / s.retrieval_heads;  // heads that share a selection
  const int64_t heads = plan.heads_per_task;
  const auto tasks = make_tasks(*p.sequences, s.kv_heads / heads, plan.query_block, query_extent);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()), [&] { return Scratch<A>(s, s.top_k); },
      [&](Scratch<A>& scratch, int64_t i) {
        const StageScope attention(Stage::kAttention);
        const Task& task = tasks[i];
        const int64_t head = task.head * heads;
        RowAttention<A> rows(p, task, head / shared, scratch);
        for (int64_t query = task.begin; query < task.end; ++query) rows.attend(query, head, head + heads);
      });
}

}  // namespace

void attend_by_query(const AttendProblem& p, const AttendPlan& plan, const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? run<double>(p, plan, executor) : run<float>(p, plan, executor);
}

}  // namespace resona::cpu
