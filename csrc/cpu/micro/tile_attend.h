// A chunk meets the rows that selected it, 64 at a time:
//
//   gather the queries                                vectors
//   logit = Q K^T                                     tiles
//   weight = softmax(logit), 16 rows at a time        vectors
//   for each 32 dims: out = weight V                  tiles
//                     sum = decay * sum + out         vectors
//
// The working set decides: K and V of a chunk are 16 KiB each (64 x 128), so the first cache cannot keep both
// beside the rows, and each block of rows reads them from the second once. 64 rows pay for that; 16 do not
// (measured: 60 of 180 cycles a row). Products of 32 dims at a time keep `out` in the first cache.
// Meanwhile the rows of the next block and the keys and values of the next chunk are fetched from memory.

constexpr int64_t kBlock = TileAttendScratch::kRows, kGroup = 16;

// Results too small for a normal float32 become 0 for as long as this lives: computed, each would cost
// hundreds of cycles, and the tiles flush them too.
class FlushToZero {
 public:
  FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

// 2^x, relative error below 2e-7; exactly 1 at 0; NaN stays NaN.
inline __m512 exp2_of(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  __m512 p = _mm512_set1_ps(1.8671301e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.0170303e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5799913e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4016445e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9315131e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

struct Max {
  static __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};
struct Min {
  static __m512 of(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
};
struct Sum {
  static __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

// Lane i of the result is row[i] reduced over its 16 lanes, by a transposing tree: in the same order for
// every i.
template <class Op>
inline __m512 reduce_rows(__m512* row) {
  for (int i = 0; i < 8; ++i)
    row[i] = Op::of(_mm512_unpacklo_ps(row[2 * i], row[2 * i + 1]),
                    _mm512_unpackhi_ps(row[2 * i], row[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(row[2 * i]), b = _mm512_castps_pd(row[2 * i + 1]);
    row[i] = Op::of(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    row[i] = Op::of(_mm512_shuffle_f32x4(row[2 * i], row[2 * i + 1], 0x88),
                    _mm512_shuffle_f32x4(row[2 * i], row[2 * i + 1], 0xdd));
  return Op::of(_mm512_shuffle_f32x4(row[0], row[1], 0x88), _mm512_shuffle_f32x4(row[0], row[1], 0xdd));
}

// Up to 16 rows. V: vectors per row of logits; the last counts as far as `tail` says.
struct SoftmaxGroup {
  int64_t count;
  const int32_t* rows;  // their accumulators
  const float* bias;    // or null
  const float* logit;   // [16, padded_brick(keys)]
  uint16_t* weight;     // the same shape
  float* decay;         // [16]
};

template <class Op, int V>
inline __m512 extreme_logits(const SoftmaxGroup& b, int64_t stride, __mmask16 tail, float neutral) {
  __m512 extreme[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const float* row = b.logit + i * stride;
    extreme[i] = _mm512_mask_loadu_ps(_mm512_set1_ps(neutral), tail, row + (V - 1) * 16);
#pragma GCC unroll 8
    for (int v = 0; v < V - 1; ++v) extreme[i] = Op::of(extreme[i], _mm512_loadu_ps(row + v * 16));
  }
  return reduce_rows<Op>(extreme);
}

template <int V>
inline void softmax_group(const TileAttend& t, const SoftmaxGroup& b, int64_t stride, __mmask16 tail) {
  const float infinity = __builtin_inff(), log2e = 1.44269504f;
  const __mmask16 rows = static_cast<__mmask16>((1u << b.count) - 1u);
  const __m512 bias = b.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(rows, b.bias);
  const __m512 extreme = t.scale >= 0 ? extreme_logits<Max, V>(b, stride, tail, -infinity)
                                      : extreme_logits<Min, V>(b, stride, tail, infinity);
  alignas(64) float highest[kGroup], reference[kGroup], before[kGroup] = {}, offset[kGroup], total[kGroup];
  _mm512_store_ps(highest, _mm512_fmadd_ps(extreme, _mm512_set1_ps(t.scale), bias));
  // One after another: a row that selected the chunk twice stands here twice.
  for (int64_t i = 0; i < b.count; ++i) {
    float& peak = t.peak[b.rows[i]];
    const float old = peak;
    peak = highest[i] > old ? highest[i] : old;
    // While every logit is -inf the reference point is 0, so that -inf - -inf never arises.
    reference[i] = peak == -infinity ? 0.0f : peak;
    before[i] = old - reference[i];
  }
  const __m512 to_base2 = _mm512_set1_ps(log2e), scale = _mm512_set1_ps(t.scale * log2e);
  _mm512_store_ps(b.decay, exp2_of(_mm512_mul_ps(_mm512_load_ps(before), to_base2)));
  _mm512_store_ps(offset,
                  _mm512_mul_ps(_mm512_sub_ps(bias, _mm512_maskz_loadu_ps(rows, reference)), to_base2));
  __m512 sum[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const float* row = b.logit + i * stride;
    uint16_t* weight = b.weight + i * stride;
    const __m512 shift = _mm512_set1_ps(offset[i]);
    __m512 w[V + 1];
    w[V] = sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      w[v] = exp2_of(_mm512_fmadd_ps(_mm512_loadu_ps(row + v * 16), scale, shift));
      if (v == V - 1) w[v] = _mm512_maskz_mov_ps(tail, w[v]);
      sum[i] = _mm512_add_ps(sum[i], w[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2)
      _mm512_storeu_si512(weight + v * 16, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(w[v + 1], w[v])));
  }
  _mm512_store_ps(total, reduce_rows<Sum>(sum));
  for (int64_t i = 0; i < b.count; ++i) {
    float& of_row = t.total[b.rows[i]];
    of_row = of_row * b.decay[i] + total[i];
  }
}

inline void softmax_keys(const TileAttend& t, const SoftmaxGroup& b) {
  const int64_t vectors = (t.key_count + 15) / 16, stride = (t.key_count + 31) / 32 * 32;
  const __mmask16 tail = static_cast<__mmask16>(0xffffu >> (vectors * 16 - t.key_count));
  switch (vectors) {
    case 1:
      return softmax_group<1>(t, b, stride, tail);
    case 2:
      return softmax_group<2>(t, b, stride, tail);
    case 3:
      return softmax_group<3>(t, b, stride, tail);
    case 4:
      return softmax_group<4>(t, b, stride, tail);
    case 5:
      return softmax_group<5>(t, b, stride, tail);
    case 6:
      return softmax_group<6>(t, b, stride, tail);
    case 7:
      return softmax_group<7>(t, b, stride, tail);
    default:
      return softmax_group<8>(t, b, stride, tail);
  }
}

// 32 dims from `dim` on of all rows of a block.
inline void merge_columns(const TileAttend& t, const int32_t* rows, int64_t count, const float* decay,
                          int64_t dim, const float* out) {
  constexpr int64_t kAhead = 6;
  for (int64_t i = 0; i < count; ++i, out += 32) {
    if (i + kAhead < count) prefetch<_MM_HINT_T0>(t.sum + rows[i + kAhead] * t.dim + dim, 128);
    float* sum = t.sum + rows[i] * t.dim + dim;
    const __m512 factor = _mm512_set1_ps(decay[i]);
    for (int64_t d = 0; d < 32; d += 16)
      _mm512_storeu_ps(sum + d, _mm512_fmadd_ps(factor, _mm512_loadu_ps(sum + d), _mm512_loadu_ps(out + d)));
  }
}

inline void prefetch_next(const TileAttend& t, int64_t first) {
  const int64_t end = first + kBlock < t.rows_known ? first + kBlock : t.rows_known;
  for (int64_t i = first; i < end; ++i) {
    prefetch<_MM_HINT_T1>(t.queries + t.rows[i] * t.dim, t.dim * 2);
    prefetch<_MM_HINT_T1>(t.sum + t.rows[i] * t.dim, t.dim * 4);
  }
  // A few rows per block: too many requests at once would hold up the work that they are to run beside.
  for (TileRows* rows = t.expected; rows < t.expected + 2; ++rows)
    for (int i = 0; i < kBlock && rows->count > 0; ++i, --rows->count, rows->data += rows->stride)
      prefetch<_MM_HINT_T1>(rows->data, rows->dim * 2);
}

inline void attend_block(const TileAttend& t, int64_t first, int64_t count) {
  TileAttendScratch& s = *t.scratch;
  const int64_t keys = (t.key_count + 15) / 16 * 16, stride = (t.key_count + 31) / 32 * 32;
  const int64_t padded_count = (count + kGroup - 1) / kGroup * kGroup;
  const int32_t* rows = t.rows + first;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < t.dim; d += 32)
      _mm512_storeu_si512(s.query + i * t.dim + d, _mm512_loadu_si512(t.queries + rows[i] * t.dim + d));
  tile_gemm({padded_count, keys, t.dim, s.query, t.dim, t.key, s.logit, stride, false});
  for (int64_t i = 0; i < count; i += kGroup)
    softmax_keys(t, {count - i < kGroup ? count - i : kGroup, rows + i,
                     t.bias == nullptr ? nullptr : t.bias + first + i, s.logit + i * stride,
                     s.weight + i * stride, s.decay + i});
  for (int64_t d = 0; d < t.dim; d += 32) {
    float* out = s.out[d / 32 & 1];
    tile_gemm({padded_count, 32, stride, s.weight, stride, t.value + d * stride, out, 32, false});
    merge_columns(t, rows, count, s.decay, d, out);
  }
}

inline void tile_attend(const TileAttend& t) {
  const FlushToZero flush;
  for (int64_t first = 0; first < t.row_count; first += kBlock) {
    prefetch_next(t, first + kBlock);
    attend_block(t, first, t.row_count - first < kBlock ? t.row_count - first : kBlock);
  }
}
