// Programmatic dependent launch. Neither instruction exists before sm_90, where launches must not carry the
// attribute either (an sm_80 image run on a newer device would start early and never wait).
// PTX ISA: "Parallel Synchronization and Communication Instructions: griddepcontrol".
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

// Until the kernel before this one has ended and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every block has said so or ended, the kernel behind may start.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace resona::cuda::ptx
