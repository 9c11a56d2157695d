// AttendParams from the arrays and numbers of a test; with packed sequences, chunk_offsets_kernel runs first.
#pragma once

#include <cstdlib>
#include <string>

#include "cuda/attend_params.cuh"
#include "runtime/arguments.h"
#include "runtime/simt.h"

namespace simt {

template <class T>
resona::cuda::HeadRows<const T> rows_of(const Arguments& a, const std::string& name) {
  return {a.array<T>(name), a.integer(name + "_batch_stride"), a.integer(name + "_token_stride"),
          a.integer(name + "_head_stride")};
}

template <class T>
resona::cuda::AttendParams<T> attend_params(const Arguments& a) {
  resona::cuda::AttendParams<T> p{};
  p.query = rows_of<T>(a, "query");
  p.key = rows_of<T>(a, "key");
  p.value = rows_of<T>(a, "value");
  p.indices = a.array<int32_t>("indices");
  p.bias = a.optional_array<float>("bias");
  p.bias_scale = a.optional_array<float>("bias_scale");
  p.sink = a.optional_array<float>("sink");
  p.out = a.array<T>("out");
  p.lse = a.array<float>("lse");
  p.batch = a.integer("batch");
  p.queries = a.integer("queries");
  p.context = a.integer("context");
  p.chunk_size = a.integer("chunk_size");
  p.chunks = p.context / p.chunk_size;
  p.top_k = a.integer("top_k");
  p.heads = static_cast<int>(a.integer("heads"));
  p.kv_heads = static_cast<int>(a.integer("kv_heads"));
  p.retrieval_heads = static_cast<int>(a.integer("retrieval_heads"));
  p.head_dim = static_cast<int>(a.integer("head_dim"));
  p.scale = std::strtof(a.text("scale").c_str(), nullptr);
  p.vector = a.integer("vector") != 0;
  p.packed.cu_seqlens = a.optional_array<int32_t>("cu_seqlens");
  if (p.packed.cu_seqlens == nullptr) return p;
  int32_t* chunk_begin = a.array<int32_t>("chunk_begin");
  p.packed.count = a.integer("sequences");
  p.packed.chunk_begin = chunk_begin;
  const resona::cuda::ChunkOffsetsParams offsets{p.packed.cu_seqlens, chunk_begin, p.packed.count, p.context,
                                                 p.chunk_size};
  launch({"chunk_offsets_kernel", dim3(1), dim3(resona::cuda::ChunkOffsetsConfig::kThreads)},
         [offsets] { resona::cuda::chunk_offsets_kernel(offsets); });
  return p;
}

}  // namespace simt
