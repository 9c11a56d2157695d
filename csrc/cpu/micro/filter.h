// Passing over chunks: one query's quick products against its threshold. Few are let through, so all there is
// to do for most vectors of products is one compare.

// Below this a product cannot belong to the best; NaN, which lets everything through, while a bound fails.
// 2^-19 where the proof wants 2^-20 (common/filter.h): the rounding of these operations.
inline float filter_bar(float kth, float margin) {
  const float size = kth < 0 ? -kth : kth;
  return (kth - margin) - size * 0x1p-19f;
}

inline void insert_product(float product, float* best, int64_t slots) {
  int64_t slot = slots - 1;
  for (; slot > 0 && best[slot - 1] < product; --slot) best[slot] = best[slot - 1];
  best[slot] = product;
}

#if defined(__AVX512F__)

// One step of a bitonic network over 16 lanes, highest first: lanes J apart change places unless the one
// whose bit J is clear holds the larger; blocks of K run the other way in turn.
template <int K, int J>
inline __m512 bitonic_step(__m512 x) {
  constexpr auto takes_larger = [] {
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i)
      if (((i & K) == 0) == ((i & J) == 0)) mask |= 1u << i;
    return mask;
  };
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(J)), x);
  return _mm512_mask_max_ps(_mm512_min_ps(x, other), static_cast<__mmask16>(takes_larger()), x, other);
}

inline __m512 merge_bitonic(__m512 x) {
  return bitonic_step<16, 1>(bitonic_step<16, 2>(bitonic_step<16, 4>(bitonic_step<16, 8>(x))));
}

inline __m512 sort_lanes(__m512 x) {
  x = bitonic_step<2, 1>(x);
  x = bitonic_step<4, 1>(bitonic_step<4, 2>(x));
  x = bitonic_step<8, 1>(bitonic_step<8, 2>(bitonic_step<8, 4>(x)));
  return merge_bitonic(x);
}

// The 16 highest of two vectors, the first of them sorted.
inline __m512 merge_lanes(__m512 sorted, __m512 x) {
  const __m512i backwards = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return merge_bitonic(_mm512_max_ps(sorted, _mm512_permutexvar_ps(backwards, sort_lanes(x))));
}

inline __mmask16 lanes_up_to(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1u);
}

// Up to 16 slots: the best stay in a register. Which lanes pass is hard to foresee, so there is no branch on
// single ones: the products that were kept of 64 are sorted into the best together.
inline int64_t filter_lanes(const FilterRow& f) {
  constexpr int64_t kBlock = 64;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i last = _mm512_set1_epi32(static_cast<int>(f.slots - 1));
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 best = _mm512_loadu_ps(f.best);
  int64_t kept = f.kept;
  for (int64_t first = 0; first < f.count; first += kBlock) {
    const int64_t end = f.count < first + kBlock ? f.count : first + kBlock, before = kept;
    const float worst = _mm512_cvtss_f32(_mm512_permutexvar_ps(last, best));
    const __m512 bar = _mm512_set1_ps(filter_bar(worst, f.margin));
    for (int64_t c = first; c < end; c += 16) {
      const __m512 x = _mm512_maskz_loadu_ps(lanes_up_to(end - c), f.products + c);
      const __mmask16 passed = _mm512_mask_cmp_ps_mask(lanes_up_to(end - c), x, bar, _CMP_NLT_UQ);
      const __m512i chunk = _mm512_add_epi32(lane, _mm512_set1_epi32(f.first_chunk + static_cast<int>(c)));
      _mm512_storeu_ps(f.kept_products + kept, _mm512_maskz_compress_ps(passed, x));
      _mm512_storeu_si512(f.kept_chunks + kept, _mm512_maskz_compress_epi32(passed, chunk));
      kept += __builtin_popcount(passed);
    }
    for (int64_t i = f.is_ranked ? kept : before; i < kept; i += 16) {
      const __m512 x = _mm512_maskz_loadu_ps(lanes_up_to(kept - i), f.kept_products + i);
      const __mmask16 number = _mm512_mask_cmp_ps_mask(lanes_up_to(kept - i), x, lowest, _CMP_GT_OQ);
      best = merge_lanes(best, _mm512_mask_mov_ps(lowest, number, x));
    }
  }
  _mm512_storeu_ps(f.best, best);
  return kept;
}

// In place, in order.
inline int64_t drop_below(float bar, float* products, int32_t* chunks, int64_t count) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = lanes_up_to(count - i);
    const __m512 x = _mm512_maskz_loadu_ps(there, products + i);
    const __m512i chunk = _mm512_maskz_loadu_epi32(there, chunks + i);
    const __mmask16 stays = _mm512_mask_cmp_ps_mask(there, x, _mm512_set1_ps(bar), _CMP_NLT_UQ);
    _mm512_storeu_ps(products + kept, _mm512_maskz_compress_ps(stays, x));
    _mm512_storeu_si512(chunks + kept, _mm512_maskz_compress_epi32(stays, chunk));
    kept += __builtin_popcount(stays);
  }
  return kept;
}

#else

inline int64_t drop_below(float bar, float* products, int32_t* chunks, int64_t count) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    products[kept] = products[i], chunks[kept] = chunks[i];
    kept += !(products[kept] < bar);
  }
  return kept;
}

#endif

inline int64_t filter_row(const FilterRow& f) {
#if defined(__AVX512F__)
  if (f.slots <= 16) return filter_lanes(f);
#endif
  float bar = filter_bar(f.best[f.slots - 1], f.margin);
  int64_t kept = f.kept;
  const auto keep = [&](int64_t c) {
    const float x = f.products[c];
    if (x < bar) return;  // it may have risen since the vector was compared
    f.kept_products[kept] = x;
    f.kept_chunks[kept++] = f.first_chunk + static_cast<int32_t>(c);
    if (f.is_ranked || !(x > f.best[f.slots - 1])) return;
    insert_product(x, f.best, f.slots);
    bar = filter_bar(f.best[f.slots - 1], f.margin);
  };
  int64_t c = 0;
  for (; c + kLanes<float> <= f.count; c += kLanes<float>) {
    uint32_t mask = not_below_mask(load(f.products + c), broadcast(bar));
    for (; mask != 0; mask &= mask - 1) keep(c + __builtin_ctz(mask));
  }
  for (; c < f.count; ++c) keep(c);
  return kept;
}
