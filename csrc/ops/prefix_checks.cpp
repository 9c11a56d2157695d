#include "ops/prefix_checks.h"

#include <cmath>

#include "ops/checker.h"

namespace resona::ops {
namespace {

constexpr int64_t kMaxFeatureDim = 32, kMaxValueDim = 128;
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;

void check_scale(const Checker& check, std::optional<double> scale) {
  if (!scale.has_value()) return;
  check.require(std::isfinite(*scale) && *scale > 0, "scale", "a positive finite number",
                std::isnan(*scale)   ? "nan"
                : std::isinf(*scale) ? (*scale > 0 ? "inf" : "-inf")
                                     : std::to_string(*scale));
}

PrefixShape check_query_key_value(const Checker& check, const Tensor& query, const Tensor& key,
                                  const Tensor& value) {
  check.rank("query", query, 4, "[B, T, H, f]");
  check.floating("query", query);
  check.runs_on("query", query);
  PrefixShape s{};
  s.batch = query.size(0), s.tokens = query.size(1), s.heads = query.size(2), s.feature_dim = query.size(3);
  check.require(s.feature_dim >= 1 && s.feature_dim <= kMaxFeatureDim, "query",
                "feature dim f from 1 to " + std::to_string(kMaxFeatureDim),
                "f = " + std::to_string(s.feature_dim));
  check.require(s.tokens <= kMaxTokens, "query", "T < 2^31", "T = " + std::to_string(s.tokens));
  check.shape("key", key, "[B, T, H, f]", {s.batch, s.tokens, s.heads, s.feature_dim});
  check.dtype("key", key, query.scalar_type(), "query");
  check.device("key", key, query, "query");
  check.rank("value", value, 4, "[B, T, H, V]");
  s.value_dim = value.size(3);
  check.require(s.value_dim >= 1 && s.value_dim <= kMaxValueDim, "value",
                "value dim V from 1 to " + std::to_string(kMaxValueDim),
                "V = " + std::to_string(s.value_dim));
  check.shape("value", value, "[B, T, H, V]", {s.batch, s.tokens, s.heads, s.value_dim});
  check.dtype("value", value, query.scalar_type(), "query");
  check.device("value", value, query, "query");
  return s;
}

void check_prefix_rows(const Checker& check, const PrefixArguments& a, PrefixShape& s) {
  check.rank("prefix_key", a.prefix_key, 4, "[B, M, H, f]");
  s.prefix_rows = a.prefix_key.size(1);
  check.shape("prefix_key", a.prefix_key, "[B, M, H, f]", {s.batch, s.prefix_rows, s.heads, s.feature_dim});
  check.dtype("prefix_key", a.prefix_key, a.query.scalar_type(), "query");
  check.device("prefix_key", a.prefix_key, a.query, "query");
  check.shape("prefix_value", a.prefix_value, "[B, M, H, V]", {s.batch, s.prefix_rows, s.heads, s.value_dim});
  check.dtype("prefix_value", a.prefix_value, a.query.scalar_type(), "query");
  check.device("prefix_value", a.prefix_value, a.query, "query");
  check.require(s.prefix_rows <= s.tokens, "prefix_key", "M <= T = " + std::to_string(s.tokens),
                "M = " + std::to_string(s.prefix_rows));
}

void check_state(const Checker& check, const char* argument, const Tensor& t, const char* layout,
                 const std::vector<int64_t>& shape, const Tensor& query) {
  check.shape(argument, t, layout, shape);
  check.exactly(argument, t, accumulation_type(query));
  check.device(argument, t, query, "query");
}

void check_cu_seqlens(const Checker& check, const PrefixArguments& a, PrefixShape& s) {
  s.sequences = s.batch;
  if (!a.cu_seqlens.has_value()) return;
  check.rank("cu_seqlens", *a.cu_seqlens, 1, "[n + 1]");
  check.exactly("cu_seqlens", *a.cu_seqlens, ScalarType::Int);
  check.device("cu_seqlens", *a.cu_seqlens, a.query, "query");
  check.require(a.cu_seqlens->size(0) >= 1, "cu_seqlens", "at least one value", "none");
  check.require(s.batch == 1, "cu_seqlens", "B = 1 for packed sequences", "B = " + std::to_string(s.batch));
  check.require(s.prefix_rows == 0 || s.prefix_rows == s.tokens, "prefix_key",
                "M = T = " + std::to_string(s.tokens) + " (or 0) for packed sequences",
                "M = " + std::to_string(s.prefix_rows));
  s.sequences = a.cu_seqlens->size(0) - 1;
}

std::vector<PrefixSequence> dense_sequences(const PrefixShape& s) {
  std::vector<PrefixSequence> sequences;
  for (int64_t b = 0; b < s.batch; ++b) sequences.push_back({b, 0, s.tokens, 0, s.prefix_rows, b * s.tokens});
  return sequences;
}

std::vector<PrefixSequence> packed_sequences(const Checker& check, const Tensor& cu_seqlens,
                                             const PrefixShape& s) {
  const Tensor borders = on_host(cu_seqlens);
  const int32_t* border = static_cast<const int32_t*>(borders.const_data_ptr());
  check.require(border[0] == 0, "cu_seqlens", "a first value of 0", std::to_string(border[0]));
  check.require(border[s.sequences] == s.tokens, "cu_seqlens",
                "a last value of T = " + std::to_string(s.tokens), std::to_string(border[s.sequences]));
  std::vector<PrefixSequence> sequences;
  for (int64_t i = 0; i < s.sequences; ++i) {
    check.require(border[i] <= border[i + 1], "cu_seqlens", "values that never decrease",
                  std::to_string(border[i]) + " before " + std::to_string(border[i + 1]));
    const int64_t begin = border[i], length = border[i + 1] - begin;
    sequences.push_back({0, begin, length, begin, s.prefix_rows == 0 ? 0 : length, begin});
  }
  return sequences;
}

// The prefix of a sequence: the first so many of the rows that it has.
void apply_prefix_lengths(const Checker& check, const Tensor& prefix_lengths,
                          std::vector<PrefixSequence>& sequences) {
  const Tensor held = on_host(prefix_lengths);
  const int32_t* length = static_cast<const int32_t*>(held.const_data_ptr());
  for (size_t i = 0; i < sequences.size(); ++i) {
    check.require(length[i] >= 0 && length[i] <= sequences[i].prefix_count, "prefix_lengths",
                  "0 to " + std::to_string(sequences[i].prefix_count) + ", the prefix rows of the sequence",
                  std::to_string(length[i]) + " at " + text_of({static_cast<int64_t>(i)}));
    sequences[i].prefix_count = length[i];
  }
}

}  // namespace

CheckedPrefix check_prefix(const char* op, const PrefixArguments& a) {
  const Checker check{op};
  CheckedPrefix checked{check_query_key_value(check, a.query, a.key, a.value), {}};
  PrefixShape& s = checked.shape;
  check_prefix_rows(check, a, s);
  check_cu_seqlens(check, a, s);
  if (a.prefix_lengths.has_value()) {
    check.shape("prefix_lengths", *a.prefix_lengths, "[n]", {s.sequences});
    check.exactly("prefix_lengths", *a.prefix_lengths, ScalarType::Int);
    check.device("prefix_lengths", *a.prefix_lengths, a.query, "query");
  }
  if (a.mask.has_value()) {
    check.shape("mask", *a.mask, "[B, T]", {s.batch, s.tokens});
    check.exactly("mask", *a.mask, ScalarType::Bool);
    check.device("mask", *a.mask, a.query, "query");
  }
  check.require(a.initial_state.has_value() == a.initial_normalizer.has_value(), "initial_normalizer",
                "to come together with initial_state", "one without the other");
  if (a.initial_state.has_value()) {
    check_state(check, "initial_state", *a.initial_state, "[n, H, F, V]",
                {s.sequences, s.heads, s.features(), s.value_dim}, a.query);
    check_state(check, "initial_normalizer", *a.initial_normalizer, "[n, H, F]",
                {s.sequences, s.heads, s.features()}, a.query);
  }
  check_scale(check, a.scale);
  if (!looks_at_values(op, a.query)) return checked;
  checked.sequences =
      a.cu_seqlens.has_value() ? packed_sequences(check, *a.cu_seqlens, s) : dense_sequences(s);
  if (a.prefix_lengths.has_value()) apply_prefix_lengths(check, *a.prefix_lengths, checked.sequences);
  return checked;
}

PrefixShape check_prefix_step(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                              const Tensor& state, const Tensor& normalizer, const OptionalTensor& mask,
                              std::optional<double> scale) {
  const Checker check{op};
  PrefixShape s = check_query_key_value(check, query, key, value);
  s.sequences = s.batch;
  check.require(s.tokens == 1, "query", "T = 1, one new token per sequence", "shape " + shape_of(query));
  check_state(check, "state", state, "[B, H, F, V]", {s.batch, s.heads, s.features(), s.value_dim}, query);
  check_state(check, "normalizer", normalizer, "[B, H, F]", {s.batch, s.heads, s.features()}, query);
  if (mask.has_value()) {
    check.shape("mask", *mask, "[B, 1]", {s.batch, 1});
    check.exactly("mask", *mask, ScalarType::Bool);
    check.device("mask", *mask, query, "query");
  }
  check_scale(check, scale);
  check.in_place("state", state, query);
  check.in_place("normalizer", normalizer, query);
  return s;
}

}  // namespace resona::ops
