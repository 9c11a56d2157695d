// What the runners pool and pool_backward share: their tests choose strides and instances.
#pragma once

#include "kernels/stage_arguments.h"

namespace pools {

inline resona::DType dtype_of(const simt::Arguments& a) {
  const std::string& name = a.text("dtype");
  return name == "float32"   ? resona::DType::kFloat32
         : name == "float16" ? resona::DType::kFloat16
                             : resona::DType::kBFloat16;
}

inline void* data_of(const simt::Arguments& a, const char* name) {
  if (size_of(dtype_of(a)) == 4) return a.array<uint32_t>(name);
  return a.array<uint16_t>(name);
}

inline resona::Shape shape_of(const simt::Arguments& a) {
  resona::Shape s{};
  s.batch = a.integer("batch"), s.context = a.integer("length");
  s.retrieval_heads = a.integer("heads"), s.retrieval_dim = a.integer("dim");
  s.chunk_size = a.integer("chunk_size");
  return s;
}

inline resona::Rows context_of(const simt::Arguments& a) {
  return {data_of(a, "context"), a.integer("batch_stride"), a.integer("token_stride"),
          a.integer("head_stride"), dtype_of(a)};
}

// Contiguous [B, tokens, R, E].
inline resona::MutableRows rows_to_write(const simt::Arguments& a, const char* name, int64_t tokens) {
  const int64_t head = a.integer("dim"), token = a.integer("heads") * head;
  return {data_of(a, name), tokens * token, token, head, dtype_of(a)};
}

inline resona::Rows rows_of(const simt::Arguments& a, const char* name, int64_t tokens) {
  const resona::MutableRows r = rows_to_write(a, name, tokens);
  return {r.data, r.batch_stride, r.token_stride, r.head_stride, r.dtype};
}

// The instance and the grid that a test names.
inline resona::CudaPoolPlan plan_of(const simt::Arguments& a) {
  resona::CudaPoolPlan plan{};
  plan.lanes = a.integer("lanes"), plan.vector = a.integer("vector") != 0;
  plan.blocks = a.integer("blocks");
  plan.sequences = resona::cuda_facts(plan.vector, stages::packed_of(a)).sequences;
  return plan;
}

// All that a pool asks for, if anything.
inline void* workspace_of(const simt::Arguments& a) { return a.optional_array<int32_t>("chunk_begin"); }

}  // namespace pools
