// Host twin of csrc/cuda/ptx/convert.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline float cvt_f32_f16(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31u, mantissa = x & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent > 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

inline float cvt_f32_bf16(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }

inline uint16_t cvt_rn_f16_f32(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
  if (x != x) return 0x7fff;  // the one NaN that the instruction returns
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  // One unit in the last place of the result; below 2^-14 the results are subnormal.
  const int unit = (magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude)) - 10;
  const uint32_t units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // The bits of a half grow with its value: 2^10 units per exponent.
  return static_cast<uint16_t>(sign | (units + static_cast<uint32_t>(unit + 24) * 0x400u));
}

inline uint16_t cvt_rn_bf16_f32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint32_t cvt_rn_f16x2_f32(float high, float low) {
  return static_cast<uint32_t>(cvt_rn_f16_f32(high)) << 16 | cvt_rn_f16_f32(low);
}

inline uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  return static_cast<uint32_t>(cvt_rn_bf16_f32(high)) << 16 | cvt_rn_bf16_f32(low);
}

inline uint32_t cvt_rna_tf32_f32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fffffffu;
  return std::isinf(x) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace resona::cuda::ptx
