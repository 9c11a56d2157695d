// The words of every argument check, and where the host may look at values.
#pragma once

#include <cstdlib>

#include "ops/backend.h"
#include "ops/checks.h"

namespace resona::ops {

inline constexpr const char* kCpuBuild =
    "device cpu (this build of resona_ext has no CUDA kernels; build it where nvcc is on PATH, with "
    "RESONA_USE_CUDA=1)";

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another device";
}

// Whether the host may look at values on the device of `t`, at the price of waiting for it.
inline bool looks_at_values(const char* op, const Tensor& t) {
  if (!t.is_cuda()) return true;
  const char* debug = std::getenv("RESONA_DEBUG");
  if (debug == nullptr || std::string(debug) != "1") return false;
  if (is_capturing(t))
    fail(op, "RESONA_DEBUG", "no graph capture, since checking values waits for the device",
         "RESONA_DEBUG=1 while a graph is captured");
  return true;
}

inline Tensor on_host(const Tensor& t) {
  const Tensor whole = as_contiguous(t);
  return t.is_cuda() ? torch::stable::to(whole, torch::stable::Device(torch::headeronly::DeviceType::CPU))
                     : whole;
}

// `like` names the argument that set the expectation.
struct Checker {
  const char* op;

  void require(bool ok, const char* argument, const std::string& expected, const std::string& got) const {
    if (!ok) fail(op, argument, expected, got);
  }
  // The first tensor decides where the operator runs.
  void runs_on(const char* argument, const Tensor& t) const {
    const bool has_kernels = t.is_cpu() || (has_cuda() && t.is_cuda());
    require(has_kernels, argument, has_cuda() ? "device cpu or cuda" : kCpuBuild, device_of(t));
  }
  void device(const char* argument, const Tensor& t, const Tensor& like, const char* name) const {
    require(device_of(t) == device_of(like), argument, "device " + device_of(like) + " like " + name,
            device_of(t));
  }
  void rank(const char* argument, const Tensor& t, int64_t rank, const char* layout) const {
    require(t.dim() == rank, argument, "rank " + std::to_string(rank) + " " + layout, "shape " + shape_of(t));
  }
  void floating(const char* argument, const Tensor& t) const {
    const ScalarType type = t.scalar_type();
    if (t.is_cuda())
      require(is_supported(type) && type != ScalarType::Double, argument,
              "dtype float32, float16 or bfloat16 on CUDA", name_of(type));
    else
      require(is_supported(type), argument, "dtype float32, float16, bfloat16 or float64", name_of(type));
  }
  void dtype(const char* argument, const Tensor& t, ScalarType type, const char* like) const {
    require(t.scalar_type() == type, argument, "dtype " + name_of(type) + " like " + like,
            name_of(t.scalar_type()));
  }
  void exactly(const char* argument, const Tensor& t, ScalarType type) const {
    require(t.scalar_type() == type, argument, "dtype " + name_of(type), name_of(t.scalar_type()));
  }
  void shape(const char* argument, const Tensor& t, const char* layout,
             const std::vector<int64_t>& expected) const {
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
    require(same, argument, std::string("shape ") + layout + " = " + text_of(expected), shape_of(t));
  }
  void size(const char* argument, const Tensor& t, int64_t dim, const char* letter, int64_t expected,
            const char* like) const {
    require(t.size(dim) == expected, argument,
            std::string(letter) + " = " + std::to_string(expected) + " like " + like, "shape " + shape_of(t));
  }
  void at_least_one(const char* argument, int64_t value) const {
    require(value >= 1, argument, "at least 1", std::to_string(value));
  }
  // What is written in place cannot be made contiguous first.
  void in_place(const char* argument, const Tensor& t, const Tensor& like) const {
    device(argument, t, like, "query");
    std::vector<int64_t> strides;
    for (int64_t i = 0; i < t.dim(); ++i) strides.push_back(t.stride(i));
    require(t.is_contiguous(), argument, "a contiguous tensor, as it is written in place",
            "strides " + text_of(strides));
  }
};

}  // namespace resona::ops
