// Operands of tile_gemm. The right one is cut into bricks of 32 depths x 16 columns, depth fastest: a brick
// is 16 rows of 64 bytes, row r holds depths 2r and 2r + 1 of the 16 columns in turn. Rows and columns that
// the source lacks are zero.

inline __m512i load_elements(const uint16_t* from, int64_t count) {
  const __mmask32 mask = count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
  return _mm512_maskz_loadu_epi16(mask, from);
}

// The right operand X^T [dim, rows] of rows X: a brick is a transpose of pairs.
inline void pack_transposed(const TileRows& x, uint16_t* to) {
  for (int64_t row = 0; row < x.count; row += 16)
    for (int64_t d = 0; d < x.dim; d += 32, to += 512) {
      __m512i brick[16];
      for (int i = 0; i < 16; ++i)
        brick[i] = row + i < x.count ? load_elements(x.data + (row + i) * x.stride + d, x.dim - d)
                                     : _mm512_setzero_si512();
      transpose_16(brick);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, brick[i]);
    }
}

// The right operand X [rows, dim] of rows X: a brick's row is two rows, element by element in turn.
inline void pack_rows(const TileRows& x, uint16_t* to) {
  const int64_t padded_rows = (x.count + 31) / 32 * 32;
  for (int64_t row = 0; row < padded_rows; row += 2)
    for (int64_t d = 0; d < x.dim; d += 32) {
      const uint16_t* from = x.data + row * x.stride + d;
      const __m512i even = row < x.count ? load_elements(from, x.dim - d) : _mm512_setzero_si512();
      const __m512i odd =
          row + 1 < x.count ? load_elements(from + x.stride, x.dim - d) : _mm512_setzero_si512();
      for (int half = 0; half < 2; ++half) {
        const __m512i low = _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(even)
                                                            : _mm512_extracti64x4_epi64(even, 1));
        const __m512i high = _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(odd)
                                                             : _mm512_extracti64x4_epi64(odd, 1));
        uint16_t* brick = to + (d / 16 + half) * padded_rows * 16 + row * 16;
        _mm512_storeu_si512(brick, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
}

template <_mm_hint Hint>
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) _mm_prefetch(static_cast<const char*>(from) + b, Hint);
}

// to = factor * from, rounded to bfloat16. Whole cache lines go to memory past the caches: heads lie apart,
// so each line would first be read from there.
inline void store_scaled(float factor, const float* from, uint16_t* to, int64_t n) {
  const __m512 by = _mm512_set1_ps(factor);
  if (n % 32 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (int64_t i = 0; i < n; i += 32) {
      const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from + i), by);
      const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + i + 16), by);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i),
                          reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1u);
    const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + i), by);
    _mm256_mask_storeu_epi16(to + i, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
}
