// Loads and stores that C++ does not express, and atomics with their memory order spelled out.
// PTX ISA: "Data Movement and Conversion Instructions: ld, st", "Memory Consistency Model".
//
// Nothing here is ld.global.nc, which promises that nobody writes while the kernel is alive: one launched
// early is alive while the kernel before it writes, and a load that may pass griddepcontrol.wait would read
// too soon.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

// Of what is read once: past the L1, which it would only sweep out.
__device__ __forceinline__ uint4 ld_global_no_allocate_v4(const void* from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

// The same through the L1: other rows of the block may want it too.
__device__ __forceinline__ uint4 ld_global_v4(const void* from) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

__device__ __forceinline__ void st_global_v4(void* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ uint32_t ld_acquire_gpu(const uint32_t* from) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ uint32_t ld_relaxed_gpu(const uint32_t* from) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ void st_release_gpu(uint32_t* to, uint32_t x) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void st_relaxed_gpu(uint32_t* to, uint32_t x) {
  asm volatile("st.relaxed.gpu.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// Atomics return the value before.
__device__ __forceinline__ uint32_t atom_add_relaxed_cta(uint32_t* at, uint32_t x) {
  uint32_t old;
  asm volatile("atom.relaxed.cta.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(x) : "memory");
  return old;
}

__device__ __forceinline__ uint32_t atom_add_relaxed_gpu(uint32_t* at, uint32_t x) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(x) : "memory");
  return old;
}

__device__ __forceinline__ uint32_t atom_add_acq_rel_gpu(uint32_t* at, uint32_t x) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(x) : "memory");
  return old;
}

__device__ __forceinline__ uint32_t atom_max_relaxed_gpu(uint32_t* at, uint32_t x) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.max.u32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(x) : "memory");
  return old;
}

__device__ __forceinline__ uint32_t atom_exch_relaxed_gpu(uint32_t* at, uint32_t x) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.exch.b32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(x) : "memory");
  return old;
}

__device__ __forceinline__ uint32_t atom_cas_acq_rel_gpu(uint32_t* at, uint32_t compare, uint32_t x) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old)
               : "l"(at), "r"(compare), "r"(x)
               : "memory");
  return old;
}

__device__ __forceinline__ float atom_add_relaxed_gpu(float* at, float x) {
  float old;
  asm volatile("atom.relaxed.gpu.add.f32 %0, [%1], %2;" : "=f"(old) : "l"(at), "f"(x) : "memory");
  return old;
}

}  // namespace resona::cuda::ptx
