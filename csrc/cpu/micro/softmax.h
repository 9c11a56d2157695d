// The softmax of one tile, forward and backward. Columns beyond `columns` up to a whole vector are
// overwritten; nothing reads them afterwards.

template <class A>
void softmax(const SoftmaxTile<A>& t) {
  const A minus_infinity = -static_cast<A>(__builtin_inff());
  for (int64_t i = 0; i < t.row_count; ++i) {
    A* row = t.tile + i * t.stride;
    const int64_t end = (t.columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    const Vec<A> scale = broadcast(t.scale), bias = broadcast(t.bias[i]);
    Vec<A> best = broadcast(minus_infinity);
    for (int64_t c = 0; c < t.columns; c += kLanes<A>) {
      Vec<A> logit = fma(load(row + c), scale, bias);
      if (c + kLanes<A> > t.columns) {  // the padding weighs nothing
        for (int64_t l = t.columns - c; l < kLanes<A>; ++l) logit[l] = minus_infinity;
      }
      store(row + c, logit);
      best = logit > best ? logit : best;
    }
    A& peak = t.peak[t.rows[i]];
    const A before = peak, tile_peak = max_of_lanes(best);
    peak = tile_peak > before ? tile_peak : before;
    // While every logit is -inf the reference point is 0, so that -inf - -inf never arises.
    const A reference = peak == minus_infinity ? A(0) : peak;
    Vec<A> total{};
    for (int64_t c = 0; c < end; c += kLanes<A>) {
      const Vec<A> weight = exp(load(row + c) - broadcast(reference));
      store(row + c, weight);
      total += weight;
    }
    const A decay = exp(broadcast(before - reference))[0];
    t.decay[i] = decay;
    t.total[t.rows[i]] = t.total[t.rows[i]] * decay + sum_of_lanes(total);
  }
}

template <class A>
void softmax_backward(const SoftmaxBackwardTile<A>& t) {
  const A minus_infinity = -static_cast<A>(__builtin_inff());
  for (int64_t i = 0; i < t.row_count; ++i) {
    A* row = t.tile + i * t.stride;
    A* gradient = t.gradient + i * t.stride;
    // A row whose logits are all -inf has no weights.
    const bool nothing = t.lse[i] == minus_infinity;
    const Vec<A> scale = broadcast(t.scale), bias = broadcast(t.bias[i]), delta = broadcast(t.delta[i]);
    const Vec<A> lse = broadcast(t.lse[i]), factor = broadcast(t.factor[i]);
    Vec<A> weights{}, gradients{};
    A weight_sum = 0, gradient_sum = 0;
    for (int64_t c = 0; c < t.columns; c += kLanes<A>) {
      const Vec<A> logit = fma(load(row + c), scale, bias);
      const Vec<A> weight = nothing ? Vec<A>{} : exp(logit - lse) * factor;
      const Vec<A> d_logit = nothing ? Vec<A>{} : weight * (load(gradient + c) - delta);
      store(row + c, weight);
      store(gradient + c, d_logit);
      if (c + kLanes<A> <= t.columns) {
        weights += weight;
        gradients += d_logit;
        continue;
      }
      for (int64_t l = 0; l < t.columns - c; ++l) {
        weight_sum += weight[l];
        gradient_sum += d_logit[l];
      }
    }
    weight_sum += sum_of_lanes(weights);
    gradient_sum += sum_of_lanes(gradients);
    t.weight_sum[i] = weight_sum;
    t.gradient_sum[i] = gradient_sum;
  }
}
