// Named barriers. Barrier 0 is __syncthreads; `threads` counts whole warps.
// PTX ISA: "Parallel Synchronization and Communication Instructions: bar, barrier".
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

__device__ __forceinline__ void barrier_sync(unsigned id, unsigned threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned id, unsigned threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace resona::cuda::ptx
