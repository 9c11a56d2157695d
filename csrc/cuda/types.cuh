// Storage types of tensors. 16-bit floats are bare bits; arithmetic happens in float32.
#pragma once

#include "cuda/device.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"

namespace resona::cuda {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return ptx::cvt_f32_f16(x.bits); }
__device__ __forceinline__ float to_float(BFloat16 x) { return ptx::cvt_f32_bf16(x.bits); }

__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, Half& to) { to.bits = ptx::cvt_rn_f16_f32(x); }
__device__ __forceinline__ void from_float(float x, BFloat16& to) { to.bits = ptx::cvt_rn_bf16_f32(x); }

// What one load instruction brings: 16 bytes, or one element where rows are not aligned to that.
template <class T, bool kVector>
struct Pack;

template <class T>
struct Pack<T, true> {
  static constexpr int kSize = 16 / sizeof(T);
  union {
    uint4 words;
    T at[kSize];
  };

  __device__ __forceinline__ void load(const T* from) { words = ptx::ld_global_no_allocate_v4(from); }
  __device__ __forceinline__ void store(T* to) const { ptx::st_global_v4(to, words); }
  __device__ __forceinline__ void clear() { words = make_uint4(0, 0, 0, 0); }
};

template <class T>
struct Pack<T, false> {
  static constexpr int kSize = 1;
  T at[1];

  __device__ __forceinline__ void load(const T* from) { at[0] = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = at[0]; }
  __device__ __forceinline__ void clear() { at[0] = T(); }
};

}  // namespace resona::cuda
