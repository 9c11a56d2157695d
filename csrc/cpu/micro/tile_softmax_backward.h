// Weights and d logit for d key and d value, where a key is a row and a query a column: what belongs to a
// query (log-sum-exp, factor, delta) is a vector, and nothing has to be summed across lanes.

inline void softmax_backward_columns(const TileColumns& t) {
  const FlushToZero flush;
  const __m512 scale = _mm512_set1_ps(t.scale), log2e = _mm512_set1_ps(1.44269504f);
  for (int64_t c = 0; c < t.stride; c += 32) {
    __m512 bias[2], lse[2], factor[2], delta[2];
    __mmask16 used[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t at = c + 16 * half, left = t.row_count - at;
      const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1u);
      bias[half] = _mm512_maskz_loadu_ps(there, t.bias + at);
      lse[half] = _mm512_maskz_loadu_ps(there, t.lse + at);
      factor[half] = _mm512_maskz_loadu_ps(there, t.factor + at);
      delta[half] = _mm512_maskz_loadu_ps(there, t.delta + at);
      // A row whose logits are all -inf has no weights.
      used[half] = there & _mm512_cmp_ps_mask(lse[half], _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
    }
    for (int64_t key = 0; key < t.key_count; ++key) {
      __m512 weight[2], gradient[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t at = key * t.stride + c + 16 * half;
        const __m512 logit = _mm512_fmadd_ps(_mm512_loadu_ps(t.product + at), scale, bias[half]);
        const __m512 power = exp2_of(_mm512_mul_ps(_mm512_sub_ps(logit, lse[half]), log2e));
        weight[half] = _mm512_maskz_mul_ps(used[half], power, factor[half]);
        const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(t.gradient + at), delta[half]);
        gradient[half] = _mm512_maskz_mul_ps(used[half], weight[half], difference);
      }
      const int64_t at = key * t.stride + c;
      _mm512_storeu_si512(t.weight + at,
                          reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weight[1], weight[0])));
      _mm512_storeu_si512(t.logit_gradient + at,
                          reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(gradient[1], gradient[0])));
    }
  }
}
