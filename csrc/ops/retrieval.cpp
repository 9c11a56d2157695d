// pool_chunks and retrieve: checks, allocation, hand-over to the backend.
#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace resona::ops {
namespace {

std::vector<int64_t> chunk_shape(const Shape& s) {
  return {s.batch, s.context / s.chunk_size, s.retrieval_heads, s.retrieval_dim};
}

// Room for the results, and the problem to `run`.
template <class Run>
std::tuple<Tensor, Tensor> search(const Checked& checked, const Tensor& query_embedding,
                                  const Tensor& chunk_embedding, const Run& run) {
  const Shape& s = checked.shape;
  const Tensor query = with_contiguous_rows(query_embedding), chunks = with_contiguous_rows(chunk_embedding);
  const std::vector<int64_t> shape{s.batch, s.queries, s.retrieval_heads, s.top_k};
  const Tensor indices = empty(query, shape, ScalarType::Int);
  const Tensor scores = empty(query, shape, accumulation_type(query));
  run({s, &checked.sequences, checked.packed(), rows_of(query), rows_of(chunks),
       static_cast<int32_t*>(indices.mutable_data_ptr()), scores.mutable_data_ptr()});
  return {indices, scores};
}

}  // namespace

Tensor pool_chunks(const Tensor& context_embedding, int64_t chunk_size, const OptionalTensor& cu_seqlens) {
  const Checked checked = check_pool_chunks("pool_chunks", context_embedding, chunk_size, cu_seqlens);
  const auto backend = backend_of(context_embedding);
  const Tensor context = with_contiguous_rows(context_embedding);
  // Packed sequences may leave rows at the end without a chunk.
  const std::vector<int64_t> shape = chunk_shape(checked.shape);
  const Tensor chunks = cu_seqlens.has_value()
                            ? sparse_result(*backend, context, shape, context.scalar_type())
                            : empty(context, shape, context.scalar_type());
  backend->pool_chunks(
      {checked.shape, &checked.sequences, checked.packed(), rows_of(context), mutable_rows_of(chunks)});
  return chunks;
}

Tensor pool_chunks_backward(const Tensor& chunk_gradient, const Tensor& context_embedding, int64_t chunk_size,
                            const OptionalTensor& cu_seqlens) {
  const char* op = "_pool_chunks_backward";
  const Checked checked = check_pool_chunks(op, context_embedding, chunk_size, cu_seqlens);
  const Shape& s = checked.shape;
  check_exact(op, "chunk_gradient", chunk_gradient, "[B, L // S, R, E]", chunk_shape(s),
              context_embedding.scalar_type(), context_embedding, "context_embedding");
  const auto backend = backend_of(context_embedding);
  const Tensor context = with_contiguous_rows(context_embedding);
  const Tensor grad = as_contiguous(chunk_gradient);
  const Tensor result = sparse_result(
      *backend, context, {s.batch, s.context, s.retrieval_heads, s.retrieval_dim}, context.scalar_type());
  backend->pool_chunks_backward(
      {s, &checked.sequences, checked.packed(), rows_of(context), rows_of(grad), mutable_rows_of(result)});
  return result;
}

std::tuple<Tensor, Tensor> retrieve(const Tensor& query_embedding, const Tensor& chunk_embedding,
                                    int64_t chunk_size, int64_t top_k, int64_t context_length,
                                    const OptionalTensor& cu_seqlens) {
  const Checked checked = check_retrieve("retrieve", query_embedding, chunk_embedding, chunk_size, top_k,
                                         context_length, cu_seqlens);
  const auto backend = backend_of(query_embedding);
  return search(checked, query_embedding, chunk_embedding,
                [&](const RetrieveProblem& p) { backend->retrieve(p); });
}

std::tuple<Tensor, Tensor> retrieve_two_level(const Tensor& query_embedding, const Tensor& chunk_embedding,
                                              int64_t chunk_size, int64_t top_k, int64_t context_length,
                                              const OptionalTensor& cu_seqlens,
                                              std::optional<int64_t> superchunk_size,
                                              std::optional<int64_t> probes) {
  const char* op = "retrieve_two_level";
  const Checked checked =
      check_retrieve(op, query_embedding, chunk_embedding, chunk_size, top_k, context_length, cu_seqlens);
  for (const auto& [name, value] : {std::pair("superchunk_size", superchunk_size), {"probes", probes}})
    if (value.has_value() && *value < 1) fail(op, name, "at least 1", std::to_string(*value));
  const auto backend = backend_of(query_embedding);
  return search(checked, query_embedding, chunk_embedding, [&](const RetrieveProblem& p) {
    backend->retrieve_two_level({p, plan_two_level(p.shape, superchunk_size, probes)});
  });
}

std::tuple<Tensor, Tensor> retrieve_backward(const Tensor& score_gradient, const Tensor& indices,
                                             const Tensor& query_embedding, const Tensor& chunk_embedding,
                                             int64_t chunk_size, int64_t context_length,
                                             const OptionalTensor& cu_seqlens) {
  const char* op = "_retrieve_backward";
  if (indices.dim() != 4) fail(op, "indices", "rank 4 [B, T, R, k]", "shape " + shape_of(indices));
  const Checked checked = check_retrieve(op, query_embedding, chunk_embedding, chunk_size, indices.size(3),
                                         context_length, cu_seqlens);
  const Shape& s = checked.shape;
  const std::vector<int64_t> slots{s.batch, s.queries, s.retrieval_heads, s.top_k};
  check_exact(op, "indices", indices, "[B, T, R, k]", slots, ScalarType::Int, query_embedding,
              "query_embedding");
  check_exact(op, "score_gradient", score_gradient, "[B, T, R, k]", slots, accumulation_type(query_embedding),
              query_embedding, "query_embedding");
  check_index_values(op, checked, indices);
  const auto backend = backend_of(query_embedding);
  const Tensor query = with_contiguous_rows(query_embedding), chunks = with_contiguous_rows(chunk_embedding);
  const Tensor held_indices = as_contiguous(indices);
  const Tensor held_gradient = as_contiguous(score_gradient);
  const Tensor query_gradient =
      empty(query, {s.batch, s.queries, s.retrieval_heads, s.retrieval_dim}, query.scalar_type());
  const Tensor chunk_gradient = sparse_result(*backend, query, chunk_shape(s), query.scalar_type());
  backend->retrieve_backward({s, &checked.sequences, checked.packed(), rows_of(query), rows_of(chunks),
                              static_cast<const int32_t*>(held_indices.const_data_ptr()),
                              held_gradient.const_data_ptr(), mutable_rows_of(query_gradient),
                              mutable_rows_of(chunk_gradient)});
  return {query_gradient, chunk_gradient};
}

}  // namespace resona::ops
