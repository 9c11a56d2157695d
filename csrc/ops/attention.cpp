// attend and the fused operator: checks, allocation, hand-over to the backend.
#include <cmath>

#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace resona::ops {
namespace {

struct Prepared {  // tensors that kernels can read, kept alive
  Tensor query, key, value;
  OptionalTensor bias, sink;
};

double scale_or_default(std::optional<double> scale, const Shape& s) {
  return scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(s.head_dim));
}

AttendProblem make_problem(const Checked& checked, const Prepared& t, const Tensor& indices,
                           std::optional<double> scale, const Tensor& out, const Tensor& lse) {
  AttendProblem p{};
  p.shape = checked.shape;
  p.sequences = &checked.sequences;
  p.packed = checked.packed();
  p.query = rows_of(t.query), p.key = rows_of(t.key), p.value = rows_of(t.value);
  p.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  p.bias = data_or_null(t.bias);
  p.bias_dtype = t.bias.has_value() ? dtype_of(*t.bias) : DType::kFloat32;
  p.sink = data_or_null(t.sink);
  p.scale = scale_or_default(scale, checked.shape);
  p.out = mutable_rows_of(out);
  p.lse = lse.mutable_data_ptr();
  return p;
}

std::vector<int64_t> out_shape(const Shape& s) { return {s.batch, s.queries, s.heads, s.head_dim}; }
std::vector<int64_t> lse_shape(const Shape& s) { return {s.batch, s.queries, s.heads}; }

}  // namespace

// `deterministic` changes nothing: on both devices every sum has one owner and one order.
std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const Tensor& indices, int64_t chunk_size, const OptionalTensor& bias,
                                  const OptionalTensor& sink, const OptionalTensor& cu_seqlens,
                                  std::optional<double> scale, bool /*deterministic*/) {
  const Checked checked =
      check_attend("attend", {query, key, value, chunk_size, sink, cu_seqlens, scale}, indices, bias);
  const Shape& s = checked.shape;
  const auto backend = backend_of(query);
  const Prepared t{with_contiguous_rows(query), with_contiguous_rows(key), with_contiguous_rows(value),
                   as_contiguous(bias), as_contiguous(sink)};
  const Tensor held_indices = as_contiguous(indices);
  const Tensor out = empty(query, out_shape(s), query.scalar_type());
  const Tensor lse = empty(query, lse_shape(s), accumulation_type(query));
  backend->attend(make_problem(checked, t, held_indices, scale, out, lse));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& out_gradient, const OptionalTensor& lse_gradient, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& indices, const Tensor& out, const Tensor& lse, int64_t chunk_size,
    const OptionalTensor& bias, const OptionalTensor& sink, const OptionalTensor& cu_seqlens,
    std::optional<double> scale, bool /*deterministic*/) {
  const char* op = "_attend_backward";
  const Checked checked =
      check_attend(op, {query, key, value, chunk_size, sink, cu_seqlens, scale}, indices, bias);
  const Shape& s = checked.shape;
  const ScalarType type = query.scalar_type(), sum_type = accumulation_type(query);
  check_exact(op, "out_gradient", out_gradient, "[B, T, H, D]", out_shape(s), type, query, "query");
  check_exact(op, "out", out, "[B, T, H, D]", out_shape(s), type, query, "query");
  check_exact(op, "lse", lse, "[B, T, H]", lse_shape(s), sum_type, query, "query");
  if (lse_gradient.has_value())
    check_exact(op, "lse_gradient", *lse_gradient, "[B, T, H]", lse_shape(s), sum_type, query, "query");

  const auto backend = backend_of(query);
  const Prepared t{with_contiguous_rows(query), with_contiguous_rows(key), with_contiguous_rows(value),
                   as_contiguous(bias), as_contiguous(sink)};
  const Tensor held_indices = as_contiguous(indices), held_out = with_contiguous_rows(out);
  const Tensor held_lse = as_contiguous(lse), grad = with_contiguous_rows(out_gradient);
  const OptionalTensor held_lse_gradient = as_contiguous(lse_gradient);
  const std::vector<int64_t> key_shape{s.batch, s.context, s.kv_heads, s.head_dim}, none{0};
  const Tensor query_gradient = empty(query, out_shape(s), type);
  const Tensor key_gradient = sparse_result(*backend, query, key_shape, type);
  const Tensor value_gradient = sparse_result(*backend, query, key_shape, type);
  const Tensor bias_gradient = zeros(
      query, bias.has_value() ? std::vector<int64_t>{s.batch, s.queries, s.retrieval_heads, s.top_k} : none,
      sum_type);
  const Tensor sink_gradient =
      zeros(query, sink.has_value() ? std::vector<int64_t>{s.heads} : none, sum_type);

  AttendBackwardProblem p{};
  p.forward = make_problem(checked, t, held_indices, scale, held_out, held_lse);
  p.out_gradient = rows_of(grad);
  p.lse_gradient = data_or_null(held_lse_gradient);
  p.query_gradient = mutable_rows_of(query_gradient);
  p.key_gradient = mutable_rows_of(key_gradient);
  p.value_gradient = mutable_rows_of(value_gradient);
  p.bias_gradient = bias.has_value() ? bias_gradient.mutable_data_ptr() : nullptr;
  p.sink_gradient = sink.has_value() ? sink_gradient.mutable_data_ptr() : nullptr;
  backend->attend_backward(p);
  return {query_gradient, key_gradient, value_gradient, bias_gradient, sink_gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_retrieve_attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_embedding,
    const Tensor& context_embedding, int64_t chunk_size, int64_t top_k, const OptionalTensor& score_scale,
    const OptionalTensor& sink, const OptionalTensor& cu_seqlens, std::optional<double> scale,
    bool /*deterministic*/) {
  const Checked checked =
      check_fused("fused_retrieve_attend", {query, key, value, chunk_size, sink, cu_seqlens, scale},
                  query_embedding, context_embedding, top_k, score_scale);
  const Shape& s = checked.shape;
  const OptionalTensor held_scale = as_contiguous(score_scale);
  const auto backend = backend_of(query);
  const Tensor context = with_contiguous_rows(context_embedding);
  const Tensor embedding = with_contiguous_rows(query_embedding);
  const Prepared t{with_contiguous_rows(query), with_contiguous_rows(key), with_contiguous_rows(value),
                   std::nullopt, as_contiguous(sink)};
  const Tensor out = empty(query, out_shape(s), query.scalar_type());
  const Tensor lse = empty(query, lse_shape(s), accumulation_type(query));
  const std::vector<int64_t> slots{s.batch, s.queries, s.retrieval_heads, s.top_k};
  const Tensor indices = empty(embedding, slots, ScalarType::Int);
  const Tensor scores = empty(embedding, slots, accumulation_type(embedding));
  FusedProblem p{};
  p.pool = {s, &checked.sequences, checked.packed(), rows_of(context), {}};
  p.retrieve = {s,
                &checked.sequences,
                checked.packed(),
                rows_of(embedding),
                {},
                static_cast<int32_t*>(indices.mutable_data_ptr()),
                scores.mutable_data_ptr()};
  p.attend = make_problem(checked, t, indices, scale, out, lse);
  p.attend.distinct = true;
  if (score_scale.has_value()) {  // the scores are the bias
    p.attend.bias = scores.const_data_ptr();
    p.attend.bias_dtype = dtype_of(scores);
    p.attend.bias_scale = data_or_null(held_scale);
  }
  backend->retrieve_attend(p);
  return {out, lse, indices, scores};
}

}  // namespace resona::ops
