// Asynchronous copies from global to shared memory. The first `source_bytes` are copied and the rest of the
// destination is zero-filled, so a row beyond the end costs no branch; with 0 the source is not read.
// PTX ISA: "Data Movement and Conversion Instructions: cp.async".
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

__device__ __forceinline__ void cp_async_cg_16(void* shared, const void* global, int source_bytes = 16) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_ca_8(void* shared, const void* global, int source_bytes = 8) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_ca_4(void* shared, const void* global, int source_bytes = 4) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kNewer` of this thread's groups, the newest, are in flight.
template <int kNewer>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewer) : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace resona::cuda::ptx
