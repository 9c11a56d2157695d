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
