#if defined(RESONA_HAS_CUDA)
#include "ops/cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <mutex>
#include <stdexcept>

#include "ops/tuning.h"

// In libtorch_cuda, which torch has only where it was built with CUDA. Weak, so that this library loads
// anyway; libtorch.so, which we link, is what brings libtorch_cuda into scope.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace resona::ops {
namespace {

// Devices do not change, so each is asked once.
const CudaDevice& describe(int device) {
  static std::mutex mutex;
  static std::map<int, CudaDevice> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = devices.find(device);
  return known != devices.end() ? known->second
                                : devices.emplace(device, cuda::describe_device(device)).first->second;
}

}  // namespace

cuda::Stream current_stream(const Tensor& t) {
  if (aoti_torch_get_current_cuda_stream == nullptr)
    throw std::runtime_error("resona: expected a torch with CUDA for a tensor on cuda:" +
                             std::to_string(t.get_device_index()) + ", got one without libtorch_cuda");
  cuda::Stream stream{nullptr, t.get_device_index()};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(stream.device, &stream.handle));
  return stream;
}

CudaCall::CudaCall(const Tensor& like)
    : like_(like),
      stream_(current_stream(like)),
      guard_(like.get_device_index()),
      device_(describe(like.get_device_index())) {
  device_.tuning = cuda_tuning();
}

Tensor CudaCall::workspace(int64_t bytes) const { return empty(like_, {bytes}, ScalarType::Byte); }

}  // namespace resona::ops
#endif
