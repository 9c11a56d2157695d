// Arguments are checked here, once, before any kernel sees them. Every failure is one error that names the
// operator, the argument, what was expected and what came. `resona_ext/_checks.py` holds the same checks
// for fake tensors; a test runs every bad input through both and compares the texts.
#pragma once

#include <string>
#include <vector>

#include "ops/tensor.h"

namespace resona::ops {

// What the checks learn on the way.
struct Checked {
  Shape shape{};
  std::vector<Sequence> sequences;
};

struct AttendArguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  int64_t chunk_size;
  const OptionalTensor& sink;
  const OptionalTensor& cu_seqlens;
  std::optional<double> scale;
};

[[noreturn]] void fail(const char* op, const std::string& argument, const std::string& expected,
                       const std::string& got);

Checked check_pool_chunks(const char* op, const Tensor& context_embedding, int64_t chunk_size,
                          const OptionalTensor& cu_seqlens);

Checked check_retrieve(const char* op, const Tensor& query_embedding, const Tensor& chunk_embedding,
                       int64_t chunk_size, int64_t top_k, int64_t context_length,
                       const OptionalTensor& cu_seqlens);

// The values of `indices` are checked too: -1, or a chunk wholly before its query.
Checked check_attend(const char* op, const AttendArguments& a, const Tensor& indices,
                     const OptionalTensor& bias);

Checked check_fused(const char* op, const AttendArguments& a, const Tensor& query_embedding,
                    const Tensor& context_embedding, int64_t top_k, const OptionalTensor& score_scale);

// Every index must be -1 or a chunk wholly before its query.
void check_index_values(const char* op, const Checked& checked, const Tensor& indices);

// A tensor that must look exactly so: gradients and saved results.
void check_exact(const char* op, const char* argument, const Tensor& t, const char* layout,
                 const std::vector<int64_t>& shape, ScalarType type);

}  // namespace resona::ops
