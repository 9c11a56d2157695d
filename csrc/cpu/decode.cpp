// One new token per sequence: search its closed chunks, attend to the finds, append it to the cache.
//
// A query alone has nothing to share a chunk with, so the search reads each chunk once and scores it
// canonically; the filter of the full search would cost more than it saves. Attention is the stage of the
// full forward over sequences of one query: same order, same bits.
#include "cpu/decode.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "common/canonical.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

// Multiplications that are worth another thread: waking one costs microseconds, far more on a busy machine,
// and a step is one of many short calls.
constexpr int64_t kWorthAThread = 1 << 20;

// The best chunks of one range, best first.
template <class A>
struct Best {
  explicit Best(int64_t slots) : slots(slots) {}

  // Chunks come in ascending order, or several such lists one after another: equals stay in that order.
  void insert(A score, int32_t index) {
    if (static_cast<int64_t>(scores.size()) == slots) {
      if (!canonical::later_ranks_above(score, scores.back())) return;
      scores.pop_back(), indices.pop_back();
    }
    size_t slot = scores.size();
    while (slot > 0 && canonical::later_ranks_above(score, scores[slot - 1])) --slot;
    scores.insert(scores.begin() + slot, score);
    indices.insert(indices.begin() + slot, index);
  }

  int64_t slots;
  std::vector<A> scores;
  std::vector<int32_t> indices;
};

struct SearchRange {
  int64_t batch, head;
  int64_t begin, end;  // chunks
};

template <class A>
struct SearchScratch {
  explicit SearchScratch(int64_t dim) : query(dim), chunk(dim) {}
  Buffer<A> query, chunk;
};

template <class A>
Best<A> search_range(const DecodeProblem& p, const SearchRange& range, SearchScratch<A>& s) {
  const Kernels<A>& kernel = kernels<A>();
  const int64_t dim = p.shape.retrieval_dim;
  const Rows& query = p.query_embedding;
  kernel.load_row(query.dtype, query.at(range.batch, 0, range.head), s.query.data(), dim);
  const double norm = std::sqrt(kernel.canonical_dot(s.query.data(), s.query.data(), dim));
  Best<A> best(p.shape.top_k);
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) {
    kernel.load_row(p.chunks.dtype, p.chunks.at(range.batch, chunk, range.head), s.chunk.data(), dim);
    const double dot = kernel.canonical_dot(s.query.data(), s.chunk.data(), dim);
    best.insert(canonical::score<A>(dot, norm), static_cast<int32_t>(chunk));
  }
  return best;
}

// Long rows are cut, so that one sequence with many chunks keeps all threads busy.
std::vector<SearchRange> search_ranges(const DecodeProblem& p) {
  const Shape& s = p.shape;
  const int64_t block = std::max<int64_t>(1, kWorthAThread / s.retrieval_dim);
  std::vector<SearchRange> ranges;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t r = 0; r < s.retrieval_heads; ++r) {
      const int64_t chunks = canonical::eligible_chunks(p.lengths[b], s.chunk_size);
      for (int64_t begin = 0; begin < chunks; begin += block)
        ranges.push_back({b, r, begin, std::min(begin + block, chunks)});
    }
  return ranges;
}

template <class A>
void search(const DecodeProblem& p, const Executor& executor) {
  const Shape& s = p.shape;
  const std::vector<SearchRange> ranges = search_ranges(p);
  std::vector<Best<A>> parts(ranges.size(), Best<A>(0));
  for_each_task(
      executor, static_cast<int64_t>(ranges.size()), [&] { return SearchScratch<A>(s.retrieval_dim); },
      [&](SearchScratch<A>& scratch, int64_t i) {
        const StageScope scope(Stage::kSearch);
        parts[i] = search_range(p, ranges[i], scratch);
      });

  A* scores = static_cast<A*>(p.scores);
  std::fill_n(scores, s.batch * s.retrieval_heads * s.top_k, -std::numeric_limits<A>::infinity());
  std::fill_n(p.indices, s.batch * s.retrieval_heads * s.top_k, -1);
  for (size_t i = 0; i < ranges.size();) {
    const int64_t row = ranges[i].batch * s.retrieval_heads + ranges[i].head;
    Best<A> best = std::move(parts[i]);
    for (++i; i < ranges.size() && ranges[i].begin > 0; ++i)
      for (size_t n = 0; n < parts[i].scores.size(); ++n)
        best.insert(parts[i].scores[n], parts[i].indices[n]);
    std::copy(best.scores.begin(), best.scores.end(), scores + row * s.top_k);
    std::copy(best.indices.begin(), best.indices.end(), p.indices + row * s.top_k);
  }
}

Rows read_only(const MutableRows& rows) {
  return {rows.data, rows.batch_stride, rows.token_stride, rows.head_stride, rows.dtype};
}

void attend_to_finds(const DecodeProblem& p, const AttendPlan& plan, const Executor& executor) {
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.shape.batch; ++b) sequences.push_back({b, 0, 1, 0, p.lengths[b] + 1, 0});
  AttendProblem attend{};
  attend.shape = p.shape;
  attend.sequences = &sequences;
  attend.query = p.query;
  attend.key = read_only(p.key_cache), attend.value = read_only(p.value_cache);
  attend.indices = p.indices;
  if (p.score_scale != nullptr) {  // the scores are the bias
    attend.bias = p.scores;
    attend.bias_dtype = p.query_embedding.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    attend.bias_scale = p.score_scale;
  }
  attend.sink = p.sink;
  attend.scale = p.scale;
  attend.distinct = true;
  attend.out = p.out;
  attend.lse = p.lse;
  cpu::attend(attend, plan, executor);
}

void copy_token(const Rows& from, const MutableRows& to, int64_t batch, int64_t token, int64_t heads,
                int64_t dim) {
  for (int64_t head = 0; head < heads; ++head)
    std::memcpy(to.at(batch, token, head), from.at(batch, 0, head),
                static_cast<size_t>(dim * size_of(from.dtype)));
}

// Adds the token to the sum of the open chunk; the chunk's last token turns the sum into a unit vector.
template <class A>
void fold_token(const DecodeProblem& p, int64_t batch, int64_t head, A* token) {
  const Kernels<A>& kernel = kernels<A>();
  const int64_t dim = p.shape.retrieval_dim, position = p.lengths[batch];
  A* sum = static_cast<A*>(p.open_sum) + (batch * p.shape.retrieval_heads + head) * dim;
  const Rows& context = p.context_embedding;
  kernel.load_row(context.dtype, context.at(batch, 0, head), token, dim);
  kernel.add_scaled(A(1), token, sum, dim);
  if ((position + 1) % p.shape.chunk_size != 0) return;
  const double norm = std::sqrt(kernel.canonical_dot(sum, sum, dim));
  for (int64_t e = 0; e < dim; ++e) token[e] = canonical::unit(sum[e], norm);
  kernel.store_row(p.chunks.dtype, token, p.chunks.at(batch, position / p.shape.chunk_size, head), dim);
  std::fill_n(sum, dim, A(0));
}

template <class A>
void append(const DecodeProblem& p, Buffer<A>& token) {
  const StageScope scope(Stage::kPool);
  const Shape& s = p.shape;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t position = p.lengths[b];
    copy_token(p.key, p.key_cache, b, position, s.kv_heads, s.head_dim);
    copy_token(p.value, p.value_cache, b, position, s.kv_heads, s.head_dim);
    if (p.history_rows > 0)
      copy_token(p.context_embedding, p.history, b, position % p.history_rows, s.retrieval_heads,
                 s.retrieval_dim);
    for (int64_t r = 0; r < s.retrieval_heads; ++r) fold_token(p, b, r, token.data());
    ++p.lengths[b];
  }
}

// Multiplications of the search, which grows with the context, and of attention, which does not.
bool is_large(const DecodeProblem& p) {
  const Shape& s = p.shape;
  int64_t searched = 0, attended = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t chunks = canonical::eligible_chunks(p.lengths[b], s.chunk_size);
    searched += chunks * s.retrieval_heads * s.retrieval_dim;
    attended += 2 * std::min(s.top_k, chunks) * s.chunk_size * s.heads * s.head_dim;
  }
  return searched + attended > 2 * kWorthAThread;
}

template <class A>
void run(const DecodeProblem& p, const AttendPlan& plan, const Executor& executor) {
  Buffer<A> token(p.shape.retrieval_dim);
  search<A>(p, executor);
  attend_to_finds(p, plan, executor);
  append<A>(p, token);
}

}  // namespace

void decode_step(const DecodeProblem& p, const AttendPlan& plan, const Executor& threads) {
  const Caller caller;
  const Executor& executor = is_large(p) ? threads : static_cast<const Executor&>(caller);
  p.query_embedding.dtype == DType::kFloat64 ? run<double>(p, plan, executor) : run<float>(p, plan, executor);
}

}  // namespace resona::cpu
