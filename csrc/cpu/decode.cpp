// One new token per sequence: search its closed chunks (decode_search.cpp), attend to the finds, append it to
// the cache. Indices and scores have the bits of the full forward. Attention is its stage over sequences of
// one query: the same to rounding, since a long forward may attend chunk by chunk, a step query by query.
#include "cpu/decode.h"

#include <cmath>
#include <cstring>

#include "common/canonical.h"
#include "cpu/buffer.h"
#include "cpu/decode_search.h"
#include "cpu/kernels.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

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

// Adds a row to the sum of the open chunk or superchunk. The last one turns the sum into a unit vector: then
// it is stored, and `row` holds it as it was rounded.
template <class A>
void fold_row(A* row, A* sum, bool is_last, void* unit, DType type, int64_t dim) {
  const Kernels<A>& kernel = kernels<A>();
  kernel.add_scaled(A(1), row, sum, dim);
  if (!is_last) return;
  const double norm = std::sqrt(kernel.canonical_dot(sum, sum, dim));
  for (int64_t e = 0; e < dim; ++e) row[e] = canonical::unit(sum[e], norm);
  kernel.store_row(type, row, unit, dim);
  kernel.load_row(type, unit, row, dim);
  std::fill_n(sum, dim, A(0));
}

// Tokens make chunks, and chunks superchunks.
template <class A>
void fold_token(const DecodeProblem& p, int64_t batch, int64_t head, A* row) {
  const int64_t dim = p.shape.retrieval_dim, end = p.lengths[batch] + 1;
  const int64_t at = (batch * p.shape.retrieval_heads + head) * dim;
  const Rows& context = p.context_embedding;
  kernels<A>().load_row(context.dtype, context.at(batch, 0, head), row, dim);
  const int64_t chunks = end / p.shape.chunk_size;  // that are closed now
  const bool closes = end % p.shape.chunk_size == 0;
  void* unit = closes ? p.chunks.at(batch, chunks - 1, head) : nullptr;
  fold_row(row, static_cast<A*>(p.open_sum) + at, closes, unit, p.chunks.dtype, dim);
  if (!closes || !p.two_level()) return;
  const bool is_last = chunks % p.superchunk_size == 0;
  void* centroid = is_last ? p.superchunks.at(batch, chunks / p.superchunk_size - 1, head) : nullptr;
  fold_row(row, static_cast<A*>(p.superchunk_sum) + at, is_last, centroid, p.superchunks.dtype, dim);
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
    searched += scored_rows(p, b) * s.retrieval_heads * s.retrieval_dim;
    attended += 2 * std::min(s.top_k, chunks) * s.chunk_size * s.heads * s.head_dim;
  }
  return searched + attended > 2 * kWorthAThread;
}

template <class A>
void run(const DecodeProblem& p, const AttendPlan& plan, const Executor& executor) {
  Buffer<A> token(p.shape.retrieval_dim);
  decode_search<A>(p, executor);
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
