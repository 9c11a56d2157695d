// Conversions between float32 and the 16-bit types, which kernels keep as bare bits.
// PTX ISA: "Data Movement and Conversion Instructions: cvt".
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

__device__ __forceinline__ float cvt_f32_f16(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// bfloat16 is the upper half of float32.
__device__ __forceinline__ float cvt_f32_bf16(uint16_t x) {
  float y;
  asm("mov.b32 %0, {%1, %2};" : "=f"(y) : "h"(static_cast<uint16_t>(0)), "h"(x));
  return y;
}

__device__ __forceinline__ uint16_t cvt_rn_f16_f32(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint16_t cvt_rn_bf16_f32(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Two at once; `low` becomes the lower half.
__device__ __forceinline__ uint32_t cvt_rn_f16x2_f32(float high, float low) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// To the nearest TF32, ties away from zero; the lower 13 bits come out as zero.
__device__ __forceinline__ uint32_t cvt_rna_tf32_f32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

}  // namespace resona::cuda::ptx
