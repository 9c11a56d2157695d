// The argument checks of prefix linear attention; `resona_ext/jrt/_checks.py` holds the same for fake
// tensors.
#pragma once

#include "common/prefix_problem.h"
#include "ops/tensor.h"

namespace resona::ops {

struct PrefixArguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const Tensor& prefix_key;
  const Tensor& prefix_value;
  const OptionalTensor& prefix_lengths;
  const OptionalTensor& mask;
  const OptionalTensor& cu_seqlens;
  const OptionalTensor& initial_state;
  const OptionalTensor& initial_normalizer;
  std::optional<double> scale;
};

struct CheckedPrefix {
  PrefixShape shape;
  std::vector<PrefixSequence> sequences;  // where the host may look at values
};

CheckedPrefix check_prefix(const char* op, const PrefixArguments& a);

PrefixShape check_prefix_step(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                              const Tensor& state, const Tensor& normalizer, const OptionalTensor& mask,
                              std::optional<double> scale);

}  // namespace resona::ops
