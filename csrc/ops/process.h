// What torch cannot do in a forked child: its OpenMP workers do not live on there, and waiting for them never
// ends. So in a child the operators use threads made for the call, and do here what they otherwise leave to
// torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <cstring>
#include <vector>

namespace resona::ops {

inline bool is_forked_child() {
  static const pid_t loaded_by = getpid();
  return getpid() != loaded_by;
}
inline const bool kKnowsWhoLoadedIt = is_forked_child();  // asked before anyone can fork

inline void zero(torch::stable::Tensor& t) {
  if (t.is_cpu() && is_forked_child())
    std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel() * t.element_size()));
  else
    torch::stable::zero_(t);
}

// Elements of `from` one after another, the last dimension fastest.
inline void copy_elements(const torch::stable::Tensor& from, char* to) {
  const int64_t width = static_cast<int64_t>(from.element_size()), dims = from.dim();
  const char* data = static_cast<const char*>(from.const_data_ptr());
  std::vector<int64_t> index(dims, 0);
  for (int64_t i = 0; i < from.numel(); ++i, to += width) {
    int64_t at = 0;
    for (int64_t d = 0; d < dims; ++d) at += index[d] * from.stride(d);
    std::memcpy(to, data + at * width, static_cast<size_t>(width));
    for (int64_t d = dims - 1; d >= 0 && ++index[d] == from.size(d); --d) index[d] = 0;
  }
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& t) {
  if (!t.is_cpu() || !is_forked_child() || t.is_contiguous()) return torch::stable::contiguous(t);
  std::vector<int64_t> size;
  for (int64_t d = 0; d < t.dim(); ++d) size.push_back(t.size(d));
  const torch::stable::Tensor copy = torch::stable::new_empty(t, size, t.scalar_type());
  copy_elements(t, static_cast<char*>(copy.mutable_data_ptr()));
  return copy;
}

}  // namespace resona::ops
