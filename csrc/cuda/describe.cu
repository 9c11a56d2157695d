// Facts about devices and streams.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace resona::cuda {
namespace {

constexpr int64_t kOldestCapability = 80;

void require(cudaError_t error, const char* step) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("resona::cuda: expected success of " + std::string(step) + ", got " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

int64_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

CudaDevice describe_device(int device) {
  const int64_t major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int64_t minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (major * 10 + minor < kOldestCapability)
    throw std::runtime_error("resona::cuda: device: expected compute capability 8.0 or newer, got " +
                             std::to_string(major) + "." + std::to_string(minor));
  return {attribute(cudaDevAttrMultiProcessorCount, device), major * 10 + minor,
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream.handle), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace resona::cuda
