// Transposes, by vectors of 16 where there are some.

#if defined(__AVX512F__)
// 16 x 16 elements of 32 bits.
inline void transpose_16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}
#endif

// to[column, row] = from[row, column], rows padded to a multiple of 16 by zeros.
template <class A>
void transpose(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to) {
  const int64_t to_stride = (rows + 15) / 16 * 16;
  for (int64_t row = 0; row < rows; row += 16) {
    const int64_t count = rows - row < 16 ? rows - row : 16;
    const A* block = from + row * from_stride;
    int64_t column = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      for (; column + 16 <= columns; column += 16) {
        __m512i lines[16];
        for (int i = 0; i < 16; ++i)
          lines[i] =
              i < count ? _mm512_loadu_si512(block + i * from_stride + column) : _mm512_setzero_si512();
        transpose_16(lines);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (column + i) * to_stride + row, lines[i]);
      }
    }
#endif
    for (; column < columns; ++column)
      for (int64_t i = 0; i < 16; ++i)
        to[column * to_stride + row + i] = i < count ? block[i * from_stride + column] : A(0);
  }
}
