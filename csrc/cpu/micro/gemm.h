// c = a * b with a register tile of M rows by V vectors; one broadcast of `a` feeds V fused multiply-adds.
// Depth is summed in slices of 64 that start from zero: a chain of 256 roundings would err more than twice
// as much as a blocked matrix product.

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 accumulators of 16 registers
#endif

template <class A, int M, int V>
inline void gemm_tile(const Gemm<A>& g, int64_t row, int64_t column) {
  constexpr int L = kLanes<A>;
  const A* a = g.a + row * g.a_row_stride;
  const A* b = g.b + column;
  A* c = g.c + row * g.c_stride + column;
  Vec<A> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = Vec<A>{};
  for (int64_t d = 0; d < g.depth; ++d) {
    Vec<A> right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(b + d * g.b_stride + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<A> left = broadcast(a[m * g.a_row_stride + d * g.a_depth_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] = fma(left, right[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      A* to = c + m * g.c_stride + v * L;
      store(to, g.accumulate ? load(to) + sum[m][v] : sum[m][v]);
    }
}

template <class A, int V>
inline void gemm_columns(const Gemm<A>& g, int64_t column) {
  int64_t row = 0;
  for (; row + kTileRows <= g.m; row += kTileRows) gemm_tile<A, kTileRows, V>(g, row, column);
  switch (g.m - row) {
    case 5:
      return gemm_tile<A, 5, V>(g, row, column);
    case 4:
      return gemm_tile<A, 4, V>(g, row, column);
    case 3:
      return gemm_tile<A, 3, V>(g, row, column);
    case 2:
      return gemm_tile<A, 2, V>(g, row, column);
    case 1:
      return gemm_tile<A, 1, V>(g, row, column);
    default:
      return;
  }
}

template <class A>
void gemm(const Gemm<A>& g) {
  constexpr int64_t kWide = int64_t{kTileVectors} * kLanes<A>;
  constexpr int64_t kDepth = 64;
  Gemm<A> slice = g;
  for (int64_t d = 0; d == 0 || d < g.depth; d += kDepth) {
    slice.depth = g.depth - d < kDepth ? g.depth - d : kDepth;
    slice.a = g.a + d * g.a_depth_stride;
    slice.b = g.b + d * g.b_stride;
    slice.accumulate = g.accumulate || d > 0;
    int64_t column = 0;
    for (; column + kWide <= g.n; column += kWide) gemm_columns<A, kTileVectors>(slice, column);
    for (; column < g.n; column += kLanes<A>) gemm_columns<A, 1>(slice, column);
  }
}
