// CUDA's built-in names on the host: what nvcc supplies without a header, or from headers of the toolkit.
// Found before csrc/cuda/device.cuh when a kernel is built for the simulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runtime/simt.h"

#define __global__ __attribute__((unused))  // static kernels of a shared header
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define RESONA_SHARED(Type, name) Type& name = ::simt::static_shared_as<Type>(#name, ::simt::Site::here())
#define RESONA_DYNAMIC_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(::simt::dynamic_shared(::simt::Site::here()))

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- barriers, fences

inline void __syncthreads(simt::Site site = simt::Site::here()) {
  simt::barrier("__syncthreads", 0, simt::kWholeBlock, true, 0, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::here()) {
  return simt::barrier("__syncthreads_count", 0, simt::kWholeBlock, true, predicate, site).count;
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
  return simt::barrier("__syncthreads_or", 0, simt::kWholeBlock, true, predicate, site).any;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::here()) {
  return simt::barrier("__syncthreads_and", 0, simt::kWholeBlock, true, predicate, site).all;
}
inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::here()) {
  simt::sync_warp(mask, site);
}
inline void __threadfence(simt::Site site = simt::Site::here()) { simt::fence(simt::Scope::kDevice, site); }
inline void __threadfence_block(simt::Site site = simt::Site::here()) {
  simt::fence(simt::Scope::kBlock, site);
}
inline void __nanosleep(unsigned, simt::Site site = simt::Site::here()) { simt::nap(site); }

// ---- shuffles, votes, match, reductions

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, simt::Site site = simt::Site::here()) {
  simt::shuffle(simt::Shuffle::kIndex, mask, &value, sizeof value, lane, width, site);
  return value;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Site site = simt::Site::here()) {
  simt::shuffle(simt::Shuffle::kUp, mask, &value, sizeof value, static_cast<int>(by), width, site);
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   simt::Site site = simt::Site::here()) {
  simt::shuffle(simt::Shuffle::kDown, mask, &value, sizeof value, static_cast<int>(by), width, site);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, simt::Site site = simt::Site::here()) {
  simt::shuffle(simt::Shuffle::kXor, mask, &value, sizeof value, lanes, width, site);
  return value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote("__ballot_sync", mask, predicate != 0, site).ballot;
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote("__any_sync", mask, predicate != 0, site).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  const simt::Vote vote = simt::vote("__all_sync", mask, predicate != 0, site);
  return vote.ballot == vote.lanes;
}
inline unsigned __activemask() { return simt::active_mask(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::here()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return simt::match_any(mask, bits, site);
}

#define SIMT_REDUCTION(name, kind)                                                            \
  inline unsigned name(unsigned mask, unsigned value, simt::Site site = simt::Site::here()) { \
    return simt::reduce(simt::Reduce::kind, false, mask, value, site);                        \
  }                                                                                           \
  inline int name(unsigned mask, int value, simt::Site site = simt::Site::here()) {           \
    return static_cast<int>(                                                                  \
        simt::reduce(simt::Reduce::kind, true, mask, static_cast<uint32_t>(value), site));    \
  }
SIMT_REDUCTION(__reduce_add_sync, kAdd)
SIMT_REDUCTION(__reduce_min_sync, kMin)
SIMT_REDUCTION(__reduce_max_sync, kMax)
SIMT_REDUCTION(__reduce_and_sync, kAnd)
SIMT_REDUCTION(__reduce_or_sync, kOr)
SIMT_REDUCTION(__reduce_xor_sync, kXor)
#undef SIMT_REDUCTION

// ---- arithmetic

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

namespace resona::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace resona::cuda
