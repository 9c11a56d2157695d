// Elements of a row in memory, of any alignment, as vectors of the accumulation type.
struct Float32Row {
  static constexpr int64_t kBytes = 4;
  static Vec<float> lanes(const char* p) {
    Vec<float> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static float one(const char* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return x;
  }
};

struct Float64Row {
  static constexpr int64_t kBytes = 8;
  static Vec<double> lanes(const char* p) {
    Vec<double> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static double one(const char* p) {
    double x;
    __builtin_memcpy(&x, p, 8);
    return x;
  }
};

struct Bfloat16Row {
  static constexpr int64_t kBytes = 2;
  static float one(const char* p) { return float_of(static_cast<uint32_t>(read_uint16(p, 0)) << 16); }
  static Vec<float> lanes(const char* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = one(p + 2 * i);
    return v;
#endif
  }
};

struct Float16Row {
  static constexpr int64_t kBytes = 2;
  static float one(const char* p) { return half_to_float(read_uint16(p, 0)); }
  static Vec<float> lanes(const char* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = one(p + 2 * i);
    return v;
#endif
  }
};
