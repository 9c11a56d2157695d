// AMX tile instructions in ordinary C++, for processors that have the vectors of bfloat16 but no tiles. Put
// before every translation unit (-include); only the one compiled for AMX sees the other meaning of their
// names.
#pragma once

#define RESONA_EMULATED_TILES

#if defined(__AMX_TILE__)
#include <immintrin.h>

namespace emulated {

struct Tile {
  char rows[16][64];
};

inline Tile& tile(int i) {
  static thread_local Tile tiles[8];
  return tiles[i];
}

inline void load(int to, const void* from, long stride) {
  for (int r = 0; r < 16; ++r)
    __builtin_memcpy(tile(to).rows[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store(int from, void* to, long stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(to) + r * stride, tile(from).rows[r], 64);
}

inline void zero(int to) { __builtin_memset(&tile(to), 0, sizeof(Tile)); }

// Row m of `to` += pairs k of row m of `a` times row k of `b`.
inline void multiply(int to, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    __m512 sum = _mm512_loadu_ps(tile(to).rows[m]);
    for (int k = 0; k < 16; ++k) {
      int pair;
      __builtin_memcpy(&pair, tile(a).rows[m] + 4 * k, 4);
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                             reinterpret_cast<__m512bh>(_mm512_loadu_si512(tile(b).rows[k])));
    }
    _mm512_storeu_ps(tile(to).rows[m], sum);
  }
}

inline void configure(const void*) {}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::multiply
#define _tile_loadconfig emulated::configure
#define _tile_storeconfig emulated::configure
#endif
