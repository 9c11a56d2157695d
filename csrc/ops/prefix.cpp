// Prefix linear attention: checks, allocation, hand-over to the backend.
#include <cmath>

#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/prefix_checks.h"

namespace resona::ops {
namespace {

struct Prepared {  // tensors that kernels can read, kept alive
  explicit Prepared(const PrefixArguments& a)
      : query(with_contiguous_rows(a.query)),
        key(with_contiguous_rows(a.key)),
        value(with_contiguous_rows(a.value)),
        prefix_key(with_contiguous_rows(a.prefix_key)),
        prefix_value(with_contiguous_rows(a.prefix_value)),
        mask(as_contiguous(a.mask)),
        cu_seqlens(as_contiguous(a.cu_seqlens)),
        prefix_lengths(as_contiguous(a.prefix_lengths)),
        initial_state(as_contiguous(a.initial_state)),
        initial_normalizer(as_contiguous(a.initial_normalizer)) {}
  Tensor query, key, value, prefix_key, prefix_value;
  OptionalTensor mask, cu_seqlens, prefix_lengths, initial_state, initial_normalizer;
};

double scale_or_default(std::optional<double> scale, const PrefixShape& s) {
  return scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(s.feature_dim));
}

std::vector<int64_t> out_shape(const PrefixShape& s) { return {s.batch, s.tokens, s.heads, s.value_dim}; }
std::vector<int64_t> state_shape(const PrefixShape& s) {
  return {s.sequences, s.heads, s.features(), s.value_dim};
}
std::vector<int64_t> normalizer_shape(const PrefixShape& s) { return {s.sequences, s.heads, s.features()}; }

PrefixProblem make_problem(const CheckedPrefix& checked, const Prepared& t, std::optional<double> scale,
                           const Tensor& out) {
  PrefixProblem p{};
  p.shape = checked.shape;
  p.sequences = &checked.sequences;
  p.packed = {static_cast<const int32_t*>(data_or_null(t.cu_seqlens)), checked.shape.sequences};
  p.prefix_lengths = static_cast<const int32_t*>(data_or_null(t.prefix_lengths));
  p.query = rows_of(t.query), p.key = rows_of(t.key), p.value = rows_of(t.value);
  p.prefix_key = rows_of(t.prefix_key), p.prefix_value = rows_of(t.prefix_value);
  p.mask = static_cast<const uint8_t*>(data_or_null(t.mask));
  p.initial_state = data_or_null(t.initial_state);
  p.initial_normalizer = data_or_null(t.initial_normalizer);
  p.scale = scale_or_default(scale, checked.shape);
  p.out = mutable_rows_of(out);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> prefix_linear_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
    const Tensor& prefix_value, const OptionalTensor& prefix_lengths, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state,
    const OptionalTensor& initial_normalizer, std::optional<double> scale) {
  const PrefixArguments a{query, key,        value,         prefix_key,         prefix_value, prefix_lengths,
                          mask,  cu_seqlens, initial_state, initial_normalizer, scale};
  const CheckedPrefix checked = check_prefix("prefix_linear_attention", a);
  const PrefixShape& s = checked.shape;
  const auto backend = backend_of(query);
  const Prepared t(a);
  // Packed sequences cover every token; a batch without any leaves nothing to write.
  const Tensor out = empty(query, out_shape(s), query.scalar_type());
  const Tensor state = empty(query, state_shape(s), accumulation_type(query));
  const Tensor normalizer = empty(query, normalizer_shape(s), accumulation_type(query));
  PrefixProblem p = make_problem(checked, t, scale, out);
  p.state = state.mutable_data_ptr(), p.normalizer = normalizer.mutable_data_ptr();
  backend->prefix_linear_attention(p);
  return {out, state, normalizer};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prefix_linear_attention_backward(
    const Tensor& out_gradient, const OptionalTensor& state_gradient,
    const OptionalTensor& normalizer_gradient, const Tensor& out, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& prefix_key, const Tensor& prefix_value,
    const OptionalTensor& prefix_lengths, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
    const OptionalTensor& initial_state, const OptionalTensor& initial_normalizer,
    std::optional<double> scale) {
  const char* op = "_prefix_linear_attention_backward";
  const PrefixArguments a{query, key,        value,         prefix_key,         prefix_value, prefix_lengths,
                          mask,  cu_seqlens, initial_state, initial_normalizer, scale};
  const CheckedPrefix checked = check_prefix(op, a);
  const PrefixShape& s = checked.shape;
  const ScalarType type = query.scalar_type(), sum_type = accumulation_type(query);
  check_exact(op, "out_gradient", out_gradient, "[B, T, H, V]", out_shape(s), type, query, "query");
  check_exact(op, "out", out, "[B, T, H, V]", out_shape(s), type, query, "query");
  if (state_gradient.has_value())
    check_exact(op, "state_gradient", *state_gradient, "[n, H, F, V]", state_shape(s), sum_type, query,
                "query");
  if (normalizer_gradient.has_value())
    check_exact(op, "normalizer_gradient", *normalizer_gradient, "[n, H, F]", normalizer_shape(s), sum_type,
                query, "query");

  const auto backend = backend_of(query);
  const Prepared t(a);
  const Tensor grad = with_contiguous_rows(out_gradient), held_out = with_contiguous_rows(out);
  const OptionalTensor held_state = as_contiguous(state_gradient);
  const OptionalTensor held_normalizer = as_contiguous(normalizer_gradient);
  const std::vector<int64_t> key_shape{s.batch, s.tokens, s.heads, s.feature_dim}, none{0};
  const Tensor query_gradient = empty(query, key_shape, type), key_gradient = empty(query, key_shape, type);
  const Tensor value_gradient = empty(query, out_shape(s), type);
  const Tensor prefix_key_gradient =
      sparse_result(*backend, query, {s.batch, s.prefix_rows, s.heads, s.feature_dim}, type);
  const Tensor prefix_value_gradient =
      sparse_result(*backend, query, {s.batch, s.prefix_rows, s.heads, s.value_dim}, type);
  const bool continued = initial_state.has_value();
  const Tensor state_result = empty(query, continued ? state_shape(s) : none, sum_type);
  const Tensor normalizer_result = empty(query, continued ? normalizer_shape(s) : none, sum_type);

  PrefixBackwardProblem p{};
  p.forward = make_problem(checked, t, scale, held_out);
  p.out_gradient = rows_of(grad);
  p.state_gradient = data_or_null(held_state);
  p.normalizer_gradient = data_or_null(held_normalizer);
  p.query_gradient = mutable_rows_of(query_gradient), p.key_gradient = mutable_rows_of(key_gradient);
  p.value_gradient = mutable_rows_of(value_gradient);
  p.prefix_key_gradient = mutable_rows_of(prefix_key_gradient);
  p.prefix_value_gradient = mutable_rows_of(prefix_value_gradient);
  p.initial_state_gradient = continued ? state_result.mutable_data_ptr() : nullptr;
  p.initial_normalizer_gradient = continued ? normalizer_result.mutable_data_ptr() : nullptr;
  backend->prefix_linear_attention_backward(p);
  return {query_gradient,        key_gradient, value_gradient,   prefix_key_gradient,
          prefix_value_gradient, state_result, normalizer_result};
}

Tensor prefix_linear_attention_step(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& state, const Tensor& normalizer, const OptionalTensor& mask,
                                    std::optional<double> scale) {
  const PrefixShape s =
      check_prefix_step("prefix_linear_attention_step", query, key, value, state, normalizer, mask, scale);
  const auto backend = backend_of(query);
  const Tensor held_query = with_contiguous_rows(query), held_key = with_contiguous_rows(key);
  const Tensor held_value = with_contiguous_rows(value);
  const OptionalTensor held_mask = as_contiguous(mask);
  const Tensor out = empty(query, out_shape(s), query.scalar_type());
  PrefixStepProblem p{};
  p.shape = s;
  p.query = rows_of(held_query), p.key = rows_of(held_key), p.value = rows_of(held_value);
  p.mask = static_cast<const uint8_t*>(data_or_null(held_mask));
  p.scale = scale_or_default(scale, s);
  p.out = mutable_rows_of(out);
  p.state = state.mutable_data_ptr(), p.normalizer = normalizer.mutable_data_ptr();
  backend->prefix_linear_attention_step(p);
  return out;
}

}  // namespace resona::ops
