// 8x8 matrices of 16-bit elements between shared memory and the registers of a warp. Lane 8 m + r gives the
// address of row r of matrix m, 16 bytes aligned; lane 4 r + c / 2 holds elements c, c + 1 of row r, or of
// column r with `trans`. All 32 lanes take part.
// PTX ISA: "Warp Level Matrix Multiply-Accumulate Instructions: ldmatrix, stmatrix".
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&x)[1], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(x[0]) : "r"(from) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&x)[2], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&x)[1], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(x[0])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&x)[2], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // kernels for older devices store by hand

__device__ __forceinline__ void stmatrix_x1(void* row, const uint32_t (&x)[1]) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(to), "r"(x[0]) : "memory");
}

__device__ __forceinline__ void stmatrix_x2(void* row, const uint32_t (&x)[2]) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(x[0]), "r"(x[1])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&x)[4]) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x1_trans(void* row, const uint32_t (&x)[1]) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(x[0]) : "memory");
}

__device__ __forceinline__ void stmatrix_x2_trans(void* row, const uint32_t (&x)[2]) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(x[0]),
               "r"(x[1])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&x)[4]) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

#endif

}  // namespace resona::cuda::ptx
