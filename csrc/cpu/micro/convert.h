// Rows in and out of the four element types. Stores round to nearest even and keep NaN.

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

inline uint16_t bfloat16_of(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u | ((u >> 16) & 0x8000u) : rounded);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

inline uint16_t half_of(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds to multiples of 2^-24
    const float rounded = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(rounded) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Pointers may be unaligned, even for the element type.
inline uint16_t read_uint16(const void* from, int64_t i) {
  uint16_t h;
  __builtin_memcpy(&h, static_cast<const char*>(from) + 2 * i, 2);
  return h;
}

inline void load_float32(const void* from, float* to, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
}
inline void store_float32(const float* from, void* to, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
}
inline void load_float64(const void* from, double* to, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n) * 8);
}
inline void store_float64(const double* from, void* to, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n) * 8);
}

inline void load_bfloat16(const void* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = float_of(static_cast<uint32_t>(read_uint16(from, i)) << 16);
}
inline void store_bfloat16(const float* from, void* to, int64_t n) {
  uint16_t* target = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) target[i] = bfloat16_of(from[i]);
}

inline void load_float16(const void* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  const char* source = static_cast<const char*>(from);
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 2 * i))));
#endif
  for (; i < n; ++i) to[i] = half_to_float(read_uint16(from, i));
}
inline void store_float16(const float* from, void* to, int64_t n) {
  uint16_t* target = static_cast<uint16_t*>(to);
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) target[i] = half_of(from[i]);
}
