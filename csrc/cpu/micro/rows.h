// Operations on single rows.

template <class A>
void add_scaled(A factor, const A* x, A* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(y + i, fma(broadcast(factor), load(x + i), load(y + i)));
  for (; i < n; ++i) y[i] = fma(broadcast(factor), broadcast(x[i]), broadcast(y[i]))[0];
}

template <class A>
void decay_and_add(A decay, const A* x, A* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(y + i, fma(broadcast(decay), load(y + i), load(x + i)));
  for (; i < n; ++i) y[i] = fma(broadcast(decay), broadcast(y[i]), broadcast(x[i]))[0];
}

// Rows of a tensor added to a zero sum, in ascending order whatever the element: N vectors of them at a time.
template <class A, class Row, int N>
inline void sum_columns(const char* from, int64_t stride, int64_t count, A* sum) {
  Vec<A> total[N];
  for (int n = 0; n < N; ++n) total[n] = Vec<A>{};
  for (int64_t i = 0; i < count; ++i, from += stride)
    for (int n = 0; n < N; ++n) total[n] += Row::lanes(from + n * kLanes<A> * Row::kBytes);
  for (int n = 0; n < N; ++n) store(sum + n * kLanes<A>, total[n]);
}

template <class A, class Row>
void sum_rows(const char* from, int64_t stride, int64_t count, int64_t n, A* sum) {
  constexpr int64_t L = kLanes<A>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) sum_columns<A, Row, 4>(from + i * Row::kBytes, stride, count, sum + i);
  for (; i + L <= n; i += L) sum_columns<A, Row, 1>(from + i * Row::kBytes, stride, count, sum + i);
  for (; i < n; ++i) {
    A total = 0;
    for (int64_t row = 0; row < count; ++row) total += Row::one(from + row * stride + i * Row::kBytes);
    sum[i] = total;
  }
}
