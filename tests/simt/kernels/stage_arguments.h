// What the runners of whole stages share: problems on contiguous arrays, as operators hand them over.
#pragma once

#include <stdexcept>

#include "common/plan_cuda.h"
#include "common/problem.h"
#include "runtime/arguments.h"

namespace stages {

constexpr resona::CudaDevice kDevice{3, 90, 232448};

inline resona::Shape shape_of(const simt::Arguments& a) {
  return {a.integer("batch"), a.integer("queries"),    a.integer("context"), 1, 1, 1, a.integer("heads"),
          a.integer("dim"),   a.integer("chunk_size"), a.integer("top_k")};
}

inline resona::DeviceSequences packed_of(const simt::Arguments& a) {
  return {a.optional_array<int32_t>("cu_seqlens"), a.integer("sequences")};
}

// [B, tokens, R, E]
inline resona::MutableRows rows_to_write(const simt::Arguments& a, const char* name, int64_t tokens) {
  const std::string& text = a.text("dtype");
  const resona::DType dtype = text == "float32"   ? resona::DType::kFloat32
                              : text == "float16" ? resona::DType::kFloat16
                                                  : resona::DType::kBFloat16;
  void* data = size_of(dtype) == 4 ? static_cast<void*>(a.array<float>(name)) : a.array<uint16_t>(name);
  const int64_t head = a.integer("dim"), token = a.integer("heads") * head;
  return {data, tokens * token, token, head, dtype};
}

inline resona::Rows rows_of(const simt::Arguments& a, const char* name, int64_t tokens) {
  const resona::MutableRows r = rows_to_write(a, name, tokens);
  return {r.data, r.batch_stride, r.token_stride, r.head_stride, r.dtype};
}

// Exactly as much as the plan asks for is the stage's to use.
inline void* workspace_of(const simt::Arguments& a, int64_t bytes) {
  if (bytes > a.integer("workspace_bytes"))
    throw std::invalid_argument("workspace: the plan wants " + std::to_string(bytes) + " bytes");
  return a.array<unsigned char>("workspace");
}

}  // namespace stages
