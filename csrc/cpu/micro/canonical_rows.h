// canonical::dot of one row with several: the chains of additions of four rows run beside one another, and
// what belongs to the first is converted once.

constexpr int kDotRows = 4;

template <class A>
struct CanonicalLanes {
  typedef A elements
      __attribute__((vector_size(canonical::kLanes * sizeof(A)), aligned(sizeof(A)), may_alias));
};
typedef double CanonicalSum __attribute__((vector_size(canonical::kLanes * sizeof(double))));

template <class A, int R>
inline void canonical_dot_rows(const A* a, const A* rows, int64_t n, double* dots) {
  using Elements = typename CanonicalLanes<A>::elements;
  CanonicalSum partial[R] = {};
  int64_t e = 0;
  for (; e + canonical::kLanes <= n; e += canonical::kLanes) {
    const CanonicalSum left =
        __builtin_convertvector(*reinterpret_cast<const Elements*>(a + e), CanonicalSum);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      partial[r] +=
          left * __builtin_convertvector(*reinterpret_cast<const Elements*>(rows + r * n + e), CanonicalSum);
  }
  for (int r = 0; r < R; ++r) {
    double sums[canonical::kLanes];
    __builtin_memcpy(sums, &partial[r], sizeof(sums));
    for (int64_t rest = e; rest < n; ++rest)
      sums[rest - e] += static_cast<double>(a[rest]) * static_cast<double>(rows[r * n + rest]);
    dots[r] = canonical::fold(sums);
  }
}

template <class A>
void canonical_dots(const A* a, const A* rows, int64_t count, int64_t n, double* dots) {
  int64_t r = 0;
  for (; r + kDotRows <= count; r += kDotRows) canonical_dot_rows<A, kDotRows>(a, rows + r * n, n, dots + r);
  for (; r < count; ++r) canonical_dot_rows<A, 1>(a, rows + r * n, n, dots + r);
}
