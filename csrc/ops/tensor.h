// The stable ABI, as the operators use it: names of types, allocation, tensors as plain Rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "common/problem.h"
#include "cpu/huge_pages.h"
#include "ops/process.h"

namespace resona::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

// The type of lse, scores, bias and sink beside a tensor of type `t`.
inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return text + "]";
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  Tensor result = torch::stable::new_empty(like, size, type);
  if (result.is_cpu())
    cpu::ask_for_huge_pages(result.data_ptr(), static_cast<size_t>(result.numel() * result.element_size()));
  return result;
}

inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  Tensor result = empty(like, size, type);
  zero(result);
  return result;
}

// Kernels want a contiguous last dimension; every other stride is theirs to follow.
inline Tensor with_contiguous_rows(const Tensor& t) {
  const bool has_rows = t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1;
  return has_rows ? t : as_contiguous(t);
}

inline Rows rows_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), dtype_of(t)};
}

inline MutableRows mutable_rows_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), dtype_of(t)};
}

// A tensor that kernels index without strides. Keep the result alive while the pointer is in use.
inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(as_contiguous(*t)) : OptionalTensor();
}

inline const void* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

}  // namespace resona::ops
