// One query row against the tokens of its chunks, read where they lie: no packing, no copies, two passes.
// Meant for rows whose chunks meet few other rows.

// logit[i] = scale <query, token i> + bias for up to N tokens of a chunk, side by side: a product's additions
// wait for each other.
template <class A, class Row, int N>
inline void row_logits(const RowAttend<A>& r, const char* key, A bias, A* logit) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[N];
  for (int n = 0; n < N; ++n) sum[n] = Vec<A>{};
  int64_t d = 0;
  for (; d + L <= r.dim; d += L) {
    const Vec<A> query = load(r.query + d);
    for (int n = 0; n < N; ++n)
      sum[n] = fma(query, Row::lanes(key + n * r.key_stride + d * Row::kBytes), sum[n]);
  }
  for (int n = 0; n < N; ++n) {
    A total = sum_of_lanes(sum[n]);
    for (int64_t e = d; e < r.dim; ++e)
      total += r.query[e] * Row::one(key + n * r.key_stride + e * Row::kBytes);
    logit[n] = total * r.scale + bias;
  }
}

// Weights in place of the logits, padded by zeros to whole vectors; returns the highest logit and the sum of
// weights.
template <class A>
inline void row_weights(const RowAttend<A>& r, int64_t count) {
  constexpr int L = kLanes<A>;
  const A minus_infinity = -static_cast<A>(__builtin_inff());
  for (int64_t i = count; i < count + L; ++i) r.weight[i] = minus_infinity;
  Vec<A> best = broadcast(minus_infinity), total{};
  for (int64_t i = 0; i < count; i += L) {
    const Vec<A> logit = load(r.weight + i);
    best = logit > best ? logit : best;
  }
  *r.peak = max_of_lanes(best);
  // While every logit is -inf the reference point is 0, so that -inf - -inf never arises.
  const Vec<A> reference = broadcast(*r.peak == minus_infinity ? A(0) : *r.peak);
  for (int64_t i = 0; i < count; i += L) {
    const Vec<A> weight = exp(load(r.weight + i) - reference);
    store(r.weight + i, weight);
    total += weight;
  }
  *r.total = sum_of_lanes(total);
}

// sum[d] over all tokens, V vectors of dims at a time.
template <class A, class Row, int V>
inline void row_values(const RowAttend<A>& r, int64_t d) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[V];
  for (int v = 0; v < V; ++v) sum[v] = Vec<A>{};
  const A* weight = r.weight;
  for (int64_t c = 0; c < r.chunk_count; ++c) {
    const char* value = r.value + r.chunks[c].token * r.value_stride + d * Row::kBytes;
    for (int64_t t = 0; t < r.chunk_size; ++t, value += r.value_stride, ++weight)
      for (int v = 0; v < V; ++v)
        sum[v] = fma(broadcast(*weight), Row::lanes(value + v * L * Row::kBytes), sum[v]);
  }
  for (int v = 0; v < V; ++v) store(r.sum + d + v * L, sum[v]);
}

template <class A, class Row>
inline void row_value(const RowAttend<A>& r, int64_t d) {
  const A* weight = r.weight;
  A sum = 0;
  for (int64_t c = 0; c < r.chunk_count; ++c) {
    const char* value = r.value + r.chunks[c].token * r.value_stride + d * Row::kBytes;
    for (int64_t t = 0; t < r.chunk_size; ++t, value += r.value_stride, ++weight)
      sum += *weight * Row::one(value);
  }
  r.sum[d] = sum;
}

template <class A, class Row>
void attend_row(const RowAttend<A>& r) {
  constexpr int L = kLanes<A>;
  A* logit = r.weight;
  for (int64_t c = 0; c < r.chunk_count; ++c) {
    const char* key = r.key + r.chunks[c].token * r.key_stride;
    int64_t t = 0;
    for (; t + 4 <= r.chunk_size; t += 4, logit += 4, key += 4 * r.key_stride)
      row_logits<A, Row, 4>(r, key, r.chunks[c].bias, logit);
    for (; t + 2 <= r.chunk_size; t += 2, logit += 2, key += 2 * r.key_stride)
      row_logits<A, Row, 2>(r, key, r.chunks[c].bias, logit);
    for (; t < r.chunk_size; ++t, ++logit, key += r.key_stride)
      row_logits<A, Row, 1>(r, key, r.chunks[c].bias, logit);
  }
  row_weights(r, logit - r.weight);
  int64_t d = 0;
  for (; d + 8 * L <= r.dim; d += 8 * L) row_values<A, Row, 8>(r, d);
  for (; d + L <= r.dim; d += L) row_values<A, Row, 1>(r, d);
  for (; d < r.dim; ++d) row_value<A, Row>(r, d);
}
