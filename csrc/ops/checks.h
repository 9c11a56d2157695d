// Arguments are checked here, once, before any kernel sees them. Every failure is one error that names the
// operator, the argument, what was expected and what came. `resona_ext/_checks.py` holds the same checks
// for fake tensors; a test runs every bad input through both and compares the texts.
//
// Shapes, dtypes and devices are checked everywhere. Values (of cu_seqlens and indices) are looked at on the
// CPU, and on CUDA only under RESONA_DEBUG=1, since that waits for the device.
#pragma once

#include <string>
#include <vector>

#include "ops/tensor.h"

namespace resona::ops {

// What the checks learn on the way.
struct Checked {
  Shape shape{};
  bool has_values = true;           // the host may look at values
  std::vector<Sequence> sequences;  // if it may
  OptionalTensor cu_seqlens;        // contiguous, on the device of the others

  DeviceSequences packed() const {
    if (!cu_seqlens.has_value()) return {nullptr, 0};
    return {static_cast<const int32_t*>(cu_seqlens->const_data_ptr()), cu_seqlens->size(0) - 1};
  }
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

Checked check_attend(const char* op, const AttendArguments& a, const Tensor& indices,
                     const OptionalTensor& bias);

Checked check_fused(const char* op, const AttendArguments& a, const Tensor& query_embedding,
                    const Tensor& context_embedding, int64_t top_k, const OptionalTensor& score_scale);

// What a decode step appends to.
struct DecodeCache {
  const Tensor& key_cache;
  const Tensor& value_cache;
  const Tensor& chunk_embedding;
  const Tensor& open_sum;
  const Tensor& history;
  const Tensor& lengths;
};

// T = 1 and L = M, the capacity of the cache.
Shape check_decode(const char* op, const AttendArguments& a, const Tensor& query_embedding,
                   const Tensor& context_embedding, int64_t top_k, const OptionalTensor& score_scale,
                   const DecodeCache& cache);

// What a decode step with a search in two levels appends to besides.
struct DecodeSuperchunks {
  const Tensor& superchunk_embedding;
  const Tensor& superchunk_sum;
  int64_t superchunk_size;
  std::optional<int64_t> probes;
};

// After check_decode, which gave the shape.
void check_superchunks(const char* op, const Shape& s, const Tensor& query, const Tensor& query_embedding,
                       const DecodeSuperchunks& superchunks);

// Where values are looked at: every index must be -1 or a chunk wholly before its query.
void check_index_values(const char* op, const Checked& checked, const Tensor& indices);

// A tensor that must look exactly so, on the device of `like`: gradients and saved results.
void check_exact(const char* op, const char* argument, const Tensor& t, const char* layout,
                 const std::vector<int64_t>& shape, ScalarType type, const Tensor& like,
                 const char* like_name);

}  // namespace resona::ops
