// The arithmetic of mma.sync. Products are exact. Sums are either rounded once from float64, or cut off
// as tensor cores do: every term is aligned to the largest exponent and loses the bits below.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "state.h"

namespace simt {
namespace {

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  const float magnitude =
      exponent ? float_of((exponent + 112) << 23 | mantissa << 13) : static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// Element `i` of the values that a lane holds in its registers.
double element(Multiply kind, const uint32_t* registers, int i) {
  if (kind == Multiply::kTF32) return float_of(registers[i] & 0xffffe000u);
  const uint32_t half = registers[i / 2] >> (16 * (i % 2)) & 0xffffu;
  return kind == Multiply::kBFloat16 ? float_of(half << 16) : from_half(half);
}

float sum_rounded(const double* terms, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += terms[i];
  return static_cast<float>(sum);
}

// floor(log2 |x|) of a normal number; faster than std::ilogb, and this is called for every element.
int exponent_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<int>(bits >> 52 & 0x7ff) - 1023;
}

double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Products of float32 numbers are far from the ends of float64's range, and so is every scale here.
float sum_truncated(const double* terms, int count) {
  constexpr int kFractionBits = 24;
  double largest = 0;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(terms[i])) return sum_rounded(terms, count);
    largest = std::max(largest, std::fabs(terms[i]));
  }
  if (largest == 0) return 0;
  const int exponent = exponent_of(largest) - kFractionBits;
  const double scale = power_of_two(-exponent);
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(terms[i] * scale);
  if (sum == 0) return 0;
  uint64_t magnitude = static_cast<uint64_t>(std::abs(sum));
  const int beyond_float = 64 - __builtin_clzll(magnitude) - 24;
  if (beyond_float > 0) magnitude = magnitude >> beyond_float << beyond_float;
  const double value = static_cast<double>(magnitude) * power_of_two(exponent);
  return static_cast<float>(sum < 0 ? -value : value);
}

}  // namespace

// PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... m16n8k8". With g = lane / 4 and t = lane % 4:
//   16 bit   a[i]: row g + 8 (i / 2 % 2), k 2 t + i % 2 + 8 (i / 4)
//            b[i]: column g,              k 2 t + i % 2 + 8 (i / 2)
//   tf32     a[i]: row g + 8 (i % 2),     k t + 4 (i / 2)
//            b[i]: column g,              k t + 4 i
//   c[i]: row g + 8 (i / 2), column 2 t + i % 2
void multiply(Multiply kind, float* const* c, const uint32_t* const* a, const uint32_t* const* b) {
  const bool tf32 = kind == Multiply::kTF32;
  const int depth = tf32 ? 8 : 16;
  double left[16][16], right[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < (tf32 ? 4 : 8); ++i) {
      const int row = tf32 ? g + 8 * (i % 2) : g + 8 * (i / 2 % 2);
      const int k = tf32 ? t + 4 * (i / 2) : 2 * t + i % 2 + 8 * (i / 4);
      left[row][k] = element(kind, a[lane], i);
    }
    for (int i = 0; i < (tf32 ? 2 : 4); ++i) {
      const int k = tf32 ? t + 4 * i : 2 * t + i % 2 + 8 * (i / 2);
      right[g][k] = element(kind, b[lane], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double terms[17] = {c[lane][i]};
      for (int k = 0; k < depth; ++k) terms[1 + k] = left[row][k] * right[column][k];
      c[lane][i] = machine.options.truncated_products ? sum_truncated(terms, depth + 1)
                                                      : sum_rounded(terms, depth + 1);
    }
  }
}

}  // namespace simt
