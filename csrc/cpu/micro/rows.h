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

inline int64_t not_below(const float* row, int64_t n, float threshold, int32_t* columns) {
  int64_t count = 0, c = 0;
  for (; c + kLanes<float> <= n; c += kLanes<float>) {
    uint32_t mask = not_below_mask(load(row + c), broadcast(threshold));
    for (; mask != 0; mask &= mask - 1) columns[count++] = static_cast<int32_t>(c) + __builtin_ctz(mask);
  }
  for (; c < n; ++c)
    if (!(row[c] < threshold)) columns[count++] = static_cast<int32_t>(c);
  return count;
}

inline int64_t not_below(const double* row, int64_t n, double threshold, int32_t* columns) {
  int64_t count = 0;
  for (int64_t c = 0; c < n; ++c)
    if (!(row[c] < threshold)) columns[count++] = static_cast<int32_t>(c);
  return count;
}
