// torch's side of a call on a CUDA device. Only for builds with CUDA kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "ops/tensor.h"

namespace resona::ops {

// The stream that torch works on, on the device of `t`.
cuda::Stream current_stream(const Tensor& t);

// One call: the tensors' device is current, and work goes to the caller's stream.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& like);

  const cuda::Stream& stream() const { return stream_; }
  const CudaDevice& device() const { return device_; }

  // From torch's allocator, on the stream of the call: when the tensor goes, later work on that stream may
  // have the memory. Never kept across calls.
  Tensor workspace(int64_t bytes) const;

 private:
  Tensor like_;
  cuda::Stream stream_;  // before the guard: it names what is missing where torch has no CUDA
  torch::stable::accelerator::DeviceGuard guard_;
  CudaDevice device_;
};

}  // namespace resona::ops
