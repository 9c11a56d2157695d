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

// Sizes that are not given are chosen by plan_two_level.
std::tuple<Tensor, Tensor> retrieve_two_level(const Tensor& query_embedding, const Tensor& chunk_embedding,
                                              int64_t chunk_size, int64_t top_k, int64_t context_length,
                                              const OptionalTensor& cu_seqlens,
                                              std::optional<int64_t> superchunk_size,
                                              std::optional<int64_t> probes);

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

// Appends to key_cache, value_cache, chunk_embedding, open_sum, history and lengths in place.
std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_embedding,
    const Tensor& context_embedding, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& chunk_embedding, const Tensor& open_sum, const Tensor& history, const Tensor& lengths,
    int64_t chunk_size, int64_t top_k, const OptionalTensor& score_scale, const OptionalTensor& sink,
    std::optional<double> scale);

// The same with a search in two levels: superchunk_embedding and superchunk_sum are appended to as well.
std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step_two_level(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_embedding,
    const Tensor& context_embedding, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& chunk_embedding, const Tensor& open_sum, const Tensor& history, const Tensor& lengths,
    const Tensor& superchunk_embedding, const Tensor& superchunk_sum, int64_t chunk_size, int64_t top_k,
    int64_t superchunk_size, const OptionalTensor& score_scale, const OptionalTensor& sink,
    std::optional<int64_t> probes, std::optional<double> scale);

std::tuple<Tensor, Tensor, Tensor> prefix_linear_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
    const Tensor& prefix_value, const OptionalTensor& prefix_lengths, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state,
    const OptionalTensor& initial_normalizer, std::optional<double> scale);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prefix_linear_attention_backward(
    const Tensor& out_gradient, const OptionalTensor& state_gradient,
    const OptionalTensor& normalizer_gradient, const Tensor& out, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& prefix_key, const Tensor& prefix_value,
    const OptionalTensor& prefix_lengths, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
    const OptionalTensor& initial_state, const OptionalTensor& initial_normalizer,
    std::optional<double> scale);

// Updates state and normalizer in place.
Tensor prefix_linear_attention_step(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& state, const Tensor& normalizer, const OptionalTensor& mask,
                                    std::optional<double> scale);

}  // namespace resona::ops
