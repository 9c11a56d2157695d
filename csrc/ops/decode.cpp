// The decode steps: checks, allocation, hand-over to the backend.
#include <cmath>

#include "common/decode_problem.h"
#include "common/plan_two_level.h"
#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace resona::ops {
namespace {

struct DecodeArguments {
  const char* op;
  AttendArguments attend;
  const Tensor& query_embedding;
  const Tensor& context_embedding;
  int64_t top_k;
  const OptionalTensor& score_scale;
  DecodeCache cache;
};

Shape checked_shape(const DecodeArguments& a) {
  return check_decode(a.op, a.attend, a.query_embedding, a.context_embedding, a.top_k, a.score_scale,
                      a.cache);
}

// Room for the results, and the problem, after extend(problem), to the backend.
template <class Extend>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const DecodeArguments& a, const Shape& s,
                                               const Extend& extend) {
  const Tensor& query = a.attend.query;
  const auto backend = backend_of(query);
  const Tensor held_query = with_contiguous_rows(query), held_key = with_contiguous_rows(a.attend.key);
  const Tensor held_value = with_contiguous_rows(a.attend.value);
  const Tensor held_query_embedding = with_contiguous_rows(a.query_embedding);
  const Tensor held_context_embedding = with_contiguous_rows(a.context_embedding);
  const OptionalTensor held_scale = as_contiguous(a.score_scale), held_sink = as_contiguous(a.attend.sink);

  const std::vector<int64_t> slots{s.batch, 1, s.retrieval_heads, a.top_k};
  const Tensor out = empty(query, {s.batch, 1, s.heads, s.head_dim}, query.scalar_type());
  const Tensor lse = empty(query, {s.batch, 1, s.heads}, accumulation_type(query));
  const Tensor indices = empty(query, slots, ScalarType::Int);
  const Tensor scores = empty(query, slots, accumulation_type(a.query_embedding));

  DecodeProblem p{};
  p.shape = s;
  p.query = rows_of(held_query), p.key = rows_of(held_key), p.value = rows_of(held_value);
  p.query_embedding = rows_of(held_query_embedding);
  p.context_embedding = rows_of(held_context_embedding);
  p.key_cache = mutable_rows_of(a.cache.key_cache), p.value_cache = mutable_rows_of(a.cache.value_cache);
  p.chunks = mutable_rows_of(a.cache.chunk_embedding);
  p.open_sum = a.cache.open_sum.mutable_data_ptr();
  p.history = mutable_rows_of(a.cache.history), p.history_rows = a.cache.history.size(1);
  p.lengths = static_cast<int32_t*>(a.cache.lengths.mutable_data_ptr());
  p.score_scale = data_or_null(held_scale), p.sink = data_or_null(held_sink);
  p.scale = a.attend.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim)));
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.scores = scores.mutable_data_ptr();
  p.out = mutable_rows_of(out), p.lse = lse.mutable_data_ptr();
  extend(p);
  backend->decode_step(p);
  return {out, lse, indices, scores};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_embedding,
    const Tensor& context_embedding, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& chunk_embedding, const Tensor& open_sum, const Tensor& history, const Tensor& lengths,
    int64_t chunk_size, int64_t top_k, const OptionalTensor& score_scale, const OptionalTensor& sink,
    std::optional<double> scale) {
  const OptionalTensor not_packed;
  const DecodeArguments a{"decode_step",
                          {query, key, value, chunk_size, sink, not_packed, scale},
                          query_embedding,
                          context_embedding,
                          top_k,
                          score_scale,
                          {key_cache, value_cache, chunk_embedding, open_sum, history, lengths}};
  return run(a, checked_shape(a), [](DecodeProblem&) {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step_two_level(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_embedding,
    const Tensor& context_embedding, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& chunk_embedding, const Tensor& open_sum, const Tensor& history, const Tensor& lengths,
    const Tensor& superchunk_embedding, const Tensor& superchunk_sum, int64_t chunk_size, int64_t top_k,
    int64_t superchunk_size, const OptionalTensor& score_scale, const OptionalTensor& sink,
    std::optional<int64_t> probes, std::optional<double> scale) {
  const OptionalTensor not_packed;
  const DecodeArguments a{"decode_step_two_level",
                          {query, key, value, chunk_size, sink, not_packed, scale},
                          query_embedding,
                          context_embedding,
                          top_k,
                          score_scale,
                          {key_cache, value_cache, chunk_embedding, open_sum, history, lengths}};
  const Shape s = checked_shape(a);
  check_superchunks(a.op, s, query, query_embedding,
                    {superchunk_embedding, superchunk_sum, superchunk_size, probes});
  return run(a, s, [&](DecodeProblem& p) {
    const TwoLevelPlan plan = plan_two_level(s, superchunk_size, probes);
    p.superchunk_size = plan.superchunk_size, p.probes = plan.probes;
    p.superchunks = mutable_rows_of(superchunk_embedding);
    p.superchunk_sum = superchunk_sum.mutable_data_ptr();
  });
}

}  // namespace resona::ops
