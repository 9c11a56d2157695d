// The same products without matrix tiles, on processors whose vectors multiply pairs of bfloat16 (VDPBF16PS):
// one broadcast of two depths of `a` meets 16 columns of a packed brick, and 32 products are added in
// float32. Operands are packed as for tiles, a row of a brick is a vector.

constexpr int64_t kSecondCache = 1 << 20;

inline void tiles_begin(void*) {}

// What was stored past the caches is seen by whoever waits for this thread.
inline void tiles_end(const void*) { _mm_sfence(); }

// M rows by N vectors of columns: at most 24 sums of 32 registers, and enough of them to cover the latency.
template <int M, int N>
inline void dot_block(const TileGemm& g, int64_t row, int64_t column) {
  const uint16_t* a = g.a + row * g.a_stride;
  const uint16_t* b = g.b + column * g.depth;
  float* c = g.c + row * g.c_stride + column;
  __m512 sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      sum[m][n] = g.accumulate ? _mm512_loadu_ps(c + m * g.c_stride + n * 16) : _mm512_setzero_ps();
  for (int64_t d = 0; d < g.depth; d += 2) {
    __m512bh right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      right[n] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + n * 16 * g.depth + d * 16));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, a + m * g.a_stride + d, 4);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * g.c_stride + n * 16, sum[m][n]);
}

// Rows are a multiple of 16: sixes, and fours where they come out.
template <int N>
inline void dot_columns(const TileGemm& g, int64_t column) {
  for (int64_t row = 0; row < g.m;) {
    if (N < 4) {
      dot_block<8, N>(g, row, column);
      row += 8;
    } else if (g.m - row > 8 || g.m - row == 6) {
      dot_block<6, N>(g, row, column);
      row += 6;
    } else {
      dot_block<4, N>(g, row, column);
      row += 4;
    }
  }
}

inline void tile_gemm(const TileGemm& g) {
  int64_t column = 0;
  for (; column + 64 <= g.n; column += 64) dot_columns<4>(g, column);
  switch ((g.n - column) / 16) {
    case 3:
      return dot_columns<3>(g, column);
    case 2:
      return dot_columns<2>(g, column);
    case 1:
      return dot_columns<1>(g, column);
    default:
      return;
  }
}

constexpr int64_t kGroup = TileAttendScratch::kGroup;

// The logits of 16 rows with up to 64 keys. Vectors do all the work here, so there is nothing to do it
// beside.
template <int N>
class LogitProduct {
 public:
  LogitProduct(const uint16_t* query, const uint16_t* key, int64_t dim, float* logit, int64_t stride)
      : product_{kGroup, N * 16, dim, query, dim, key, logit, stride, false} {}
  void advance(int64_t) {}
  void finish() { tile_gemm(product_); }

 private:
  TileGemm product_;
};
