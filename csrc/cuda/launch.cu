#include "cuda/launch.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/build_info.h"

namespace resona::cuda {
namespace {

constexpr int kPtxWithDependentLaunch = 90;
constexpr int64_t kSharedWithoutOptIn = 48 << 10;  // static and dynamic

// What helps where the library holds nothing that the device can run.
std::string remedy(cudaError_t error) {
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion &&
      error != cudaErrorInvalidPtx)
    return "";
  return " (built for " + cuda_architectures() +
         "; TORCH_CUDA_ARCH_LIST builds for other GPUs, and PTX, compute_*, needs a driver at least as new "
         "as "
         "the compiler)";
}

// CUDA keeps the last error for whoever asks next; it is taken back here, so a refused launch spoils nothing.
void require(cudaError_t error, const char* step, const Launch& l) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("resona::cuda: " + std::string(l.name) + ": expected success of " + step +
                           " (grid " + text_of(l.grid) + ", " + std::to_string(l.threads) + " threads, " +
                           std::to_string(l.shared_bytes) +
                           " bytes of dynamic shared memory; plan: " + l.plan + "), got " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error) + remedy(error));
}

struct Facts {
  bool known = false;
  bool waits = false;        // griddepcontrol.wait is in the image that runs
  int64_t shared_bytes = 0;  // dynamic, as far as opted in
};

// Whether the kernel waits, as the image that runs on this device says; also opts in to shared memory.
//
// griddepcontrol.wait is compiled in from compute_90 on. A compute_80 image translated for a newer device
// lacks it, and launched early it would race with the kernel before it.
bool prepare(const Launch& l, int device, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Facts> all;
  const std::lock_guard<std::mutex> lock(mutex);
  Facts& facts = all[{kernel, device}];
  if (!facts.known) {
    cudaFuncAttributes attributes{};
    require(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", l);
    facts.waits = attributes.ptxVersion >= kPtxWithDependentLaunch;
    const int64_t fixed = static_cast<int64_t>(attributes.sharedSizeBytes);
    facts.shared_bytes = std::min<int64_t>(attributes.maxDynamicSharedSizeBytes, kSharedWithoutOptIn - fixed);
    facts.known = true;
  }
  if (l.shared_bytes > facts.shared_bytes) {
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(l.shared_bytes)),
            "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", l);
    facts.shared_bytes = l.shared_bytes;
  }
  return facts.waits;
}

}  // namespace

void detail::launch(const Launch& l, Stream stream, const void* kernel, void** arguments) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return;
  check_grid(l);
  const bool waits = prepare(l, stream.device, kernel);
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;

  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(l.grid.x), static_cast<unsigned>(l.grid.y), static_cast<unsigned>(l.grid.z));
  config.blockDim = dim3(static_cast<unsigned>(l.threads));
  config.dynamicSmemBytes = static_cast<size_t>(l.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &dependent;
  config.numAttrs = l.dependent && waits ? 1 : 0;
  require(cudaLaunchKernelExC(&config, kernel, arguments), "launch", l);
}

}  // namespace resona::cuda
