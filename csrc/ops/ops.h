// The operators on CPU and CUDA tensors. Schemas and shapes stand in register.cpp.
#pragma once

#include <tuple>

#include "ops/tensor.h"

namespace resona::ops {

Tensor pool_chunks(const Tensor& context_embedding, int64_t chunk_size, const OptionalTensor& cu_seqlens);

Tensor pool_chunks_backward(const Tensor& chunk_gradient, const Tensor& context_embedding, int64_t chunk_size,
                            const OptionalTensor& cu_seqlens);

std::tuple<Tensor, Tensor> retrieve(const Tensor& query_embedding, const Tensor& chunk_embedding,
                                    int64_t chunk_size, int64_t top_k, int64_t context_length,
                                    const OptionalTensor& cu_seqlens);

std::tuple<Tensor, Tensor> retrieve_backward(const Tensor& score_gradient, const Tensor& indices,
                                             const Tensor& query_embedding, const Tensor& chunk_embedding,
                                             int64_t chunk_size, int64_t context_length,
                                             const OptionalTensor& cu_seqlens);

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const Tensor& indices, int64_t chunk_size, const OptionalTensor& bias,
                                  const OptionalTensor& sink, const OptionalTensor& cu_seqlens,
                                  std::optional<double> scale, bool deterministic);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& out_gradient, const OptionalTensor& lse_gradient, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& indices, const Tensor& out, const Tensor& lse, int64_t chunk_size,
    const OptionalTensor& bias, const OptionalTensor& sink, const OptionalTensor& cu_seqlens,
    std::optional<double> scale, bool deterministic);

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_retrieve_attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_embedding,
    const Tensor& context_embedding, int64_t chunk_size, int64_t top_k, const OptionalTensor& score_scale,
    const OptionalTensor& sink, const OptionalTensor& cu_seqlens, std::optional<double> scale,
    bool deterministic);

}  // namespace resona::ops
