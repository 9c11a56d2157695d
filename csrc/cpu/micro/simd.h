// Vectors of one instruction set. Included once per translation unit, inside the namespace RESONA_ISA;
// arithmetic uses the compiler's vector extension, intrinsics appear only where it has no word for them.
// Nothing here may come from a std:: template: the linker could keep the copy compiled for the wider
// instruction set and hand it to code that runs on an older processor.

constexpr int kVectorBytes =
#if defined(__AVX512F__)
    64;
#elif defined(__AVX2__)
    32;
#else
    16;
#endif

template <class A>
struct Simd;

template <>
struct Simd<float> {
  typedef float vector __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  typedef double vector __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
};

template <class A>
using Vec = typename Simd<A>::vector;

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::unaligned*>(p);
}

template <class A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Simd<A>::unaligned*>(p) = v;
}

template <class A>
inline Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

// The host code is compiled without contraction, so a fused multiply-add is asked for by name.
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Bit i is set where not (v[i] < threshold[i]), so NaN counts as set.
inline uint32_t not_below_mask(Vec<float> v, Vec<float> threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, threshold, _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, threshold, _CMP_NLT_UQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<float>; ++i) mask |= static_cast<uint32_t>(!(v[i] < threshold[i])) << i;
  return mask;
#endif
}

#if defined(__AVX512F__)
inline float sum_of_lanes(Vec<float> v) { return _mm512_reduce_add_ps(v); }
inline double sum_of_lanes(Vec<double> v) { return _mm512_reduce_add_pd(v); }
// NaN lanes may be passed over: they come back through the weights.
inline float max_of_lanes(Vec<float> v) { return _mm512_reduce_max_ps(v); }
inline double max_of_lanes(Vec<double> v) { return _mm512_reduce_max_pd(v); }
#else
// Halves are added until one lane is left.
template <class V>
inline auto sum_of_lanes(V v) {
  constexpr int n = sizeof(v) / sizeof(v[0]);
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

template <class V>
inline auto max_of_lanes(V v) {
  constexpr int n = sizeof(v) / sizeof(v[0]);
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i + half] > v[i] ? v[i + half] : v[i];
  return v[0];
}
#endif

// e^x. float: within 2 ulp for x <= 0, zero below -87.3; NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  typedef Simd<float>::integer integer;
  const Vec<float> low = broadcast(-87.3f), high = broadcast(88.7f);
  const Vec<float> clamped = x < low ? low : (x > high ? high : x);
  const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = fma(clamped, broadcast(1.44269504f), magic) - magic;
  Vec<float> r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + broadcast(1.0f));
  const integer exponent = (__builtin_convertvector(n, integer) + 127) << 23;
  const Vec<float> result = p * reinterpret_cast<Vec<float>>(exponent);
  return x < low ? Vec<float>{} : (x > high ? broadcast(__builtin_inff()) : result);
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}
