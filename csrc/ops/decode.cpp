// The decode step: checks, allocation, hand-over to the backend.
#include <cmath>

#include "common/decode_problem.h"
#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace resona::ops {

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_embedding,
    const Tensor& context_embedding, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& chunk_embedding, const Tensor& open_sum, const Tensor& history, const Tensor& lengths,
    int64_t chunk_size, int64_t top_k, const OptionalTensor& score_scale, const OptionalTensor& sink,
    std::optional<double> scale) {
  const Shape s = check_decode("decode_step", {query, key, value, chunk_size, sink, std::nullopt, scale},
                               query_embedding, context_embedding, top_k, score_scale,
                               {key_cache, value_cache, chunk_embedding, open_sum, history, lengths});
  const auto backend = backend_of(query);
  const Tensor held_query = with_contiguous_rows(query), held_key = with_contiguous_rows(key);
  const Tensor held_value = with_contiguous_rows(value);
  const Tensor held_query_embedding = with_contiguous_rows(query_embedding);
  const Tensor held_context_embedding = with_contiguous_rows(context_embedding);
  const OptionalTensor held_scale = contiguous(score_scale), held_sink = contiguous(sink);

  const std::vector<int64_t> slots{s.batch, 1, s.retrieval_heads, top_k};
  const Tensor out = empty(query, {s.batch, 1, s.heads, s.head_dim}, query.scalar_type());
  const Tensor lse = empty(query, {s.batch, 1, s.heads}, accumulation_type(query));
  const Tensor indices = empty(query, slots, ScalarType::Int);
  const Tensor scores = empty(query, slots, accumulation_type(query_embedding));

  DecodeProblem p{};
  p.shape = s;
  p.query = rows_of(held_query), p.key = rows_of(held_key), p.value = rows_of(held_value);
  p.query_embedding = rows_of(held_query_embedding);
  p.context_embedding = rows_of(held_context_embedding);
  p.key_cache = mutable_rows_of(key_cache), p.value_cache = mutable_rows_of(value_cache);
  p.chunks = mutable_rows_of(chunk_embedding);
  p.open_sum = open_sum.mutable_data_ptr();
  p.history = mutable_rows_of(history), p.history_rows = history.size(1);
  p.lengths = static_cast<int32_t*>(lengths.mutable_data_ptr());
  p.score_scale = data_or_null(held_scale), p.sink = data_or_null(held_sink);
  p.scale = scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(s.head_dim));
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.scores = scores.mutable_data_ptr();
  p.out = mutable_rows_of(out), p.lse = lse.mutable_data_ptr();
  backend->decode_step(p);
  return {out, lse, indices, scores};
}

}  // namespace resona::ops
