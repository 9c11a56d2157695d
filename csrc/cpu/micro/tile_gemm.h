// Matrix products of bfloat16 on AMX tiles: 16 rows of 64 bytes each, eight of them. A tile product
// multiplies 16 x 32 by 32 x 16 elements and takes 16 cycles; loading a tile takes 8. So a block of 2 x 2
// results is kept (tiles 0-3), fed by two tiles of `a` (4, 5) and two of `b` (6, 7): four loads per four
// products.

constexpr int64_t kSecondCache = 2 << 20;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == kTileStateBytes);

// Not a local variable: gcc's _tile_loadconfig says that it reads 8 bytes, so stores to the others may
// vanish.
constexpr TileConfig kTileConfig;

// Other libraries of this thread may have configured the tiles for themselves.
inline void tiles_begin(void* saved) {
  _tile_storeconfig(saved);
  _tile_loadconfig(&kTileConfig);
}

// What was stored past the caches is seen by whoever waits for this thread.
inline void tiles_end(const void* saved) {
  _mm_sfence();
  _tile_loadconfig(saved);
}

// M row tiles by N column tiles.
template <int M, int N>
inline void tile_block(const TileGemm& g, int64_t row, int64_t column) {
  const uint16_t* a = g.a + row * g.a_stride;
  const uint16_t* b = g.b + column * g.depth;
  const uint16_t* next_a = a + 16 * g.a_stride;
  const uint16_t* next_b = b + 16 * g.depth;
  float* c = g.c + row * g.c_stride + column;
  float* next_c = c + 16 * g.c_stride;
  const int64_t a_bytes = g.a_stride * 2, c_bytes = g.c_stride * 4;
  if (g.accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (N == 2) _tile_loadd(1, c + 16, c_bytes);
    if (M == 2) _tile_loadd(2, next_c, c_bytes);
    if (M == 2 && N == 2) _tile_loadd(3, next_c + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t d = 0; d < g.depth; d += 32) {
    _tile_loadd(4, a + d, a_bytes);
    _tile_loadd(6, b + d * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (N == 2) {
      _tile_loadd(7, next_b + d * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (M == 2) {
      _tile_loadd(5, next_a + d, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (N == 2) _tile_stored(1, c + 16, c_bytes);
  if (M == 2) _tile_stored(2, next_c, c_bytes);
  if (M == 2 && N == 2) _tile_stored(3, next_c + 16, c_bytes);
}

// Rows inside: two columns of `b` stay in the first cache for all of them.
template <int N>
inline void tile_columns(const TileGemm& g, int64_t column) {
  int64_t row = 0;
  for (; row + 32 <= g.m; row += 32) tile_block<2, N>(g, row, column);
  if (row < g.m) tile_block<1, N>(g, row, column);
}

inline void tile_gemm(const TileGemm& g) {
  int64_t column = 0;
  for (; column + 32 <= g.n; column += 32) tile_columns<2>(g, column);
  if (column < g.n) tile_columns<1>(g, column);
}

constexpr int64_t kGroup = TileAttendScratch::kGroup;

// The logits of 16 rows with up to 64 keys, 32 dims a step, so that something else can be done in between.
// N: tiles of keys; their sums stay in tiles 0 to N - 1.
template <int N>
class LogitProduct {
 public:
  LogitProduct(const uint16_t* query, const uint16_t* key, int64_t dim, float* logit, int64_t stride)
      : query_(query), key_(key), dim_(dim), logit_(logit), stride_(stride) {
    __atomic_signal_fence(__ATOMIC_SEQ_CST);  // gcc's tile loads do not say that they read memory
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (N > 2) _tile_zero(2);
    if (N > 3) _tile_zero(3);
  }

  // Of all steps as many as belong before `done` of kGroup rows.
  void advance(int64_t done) {
    for (; step_ < dim_ && step_ * kGroup <= done * dim_; step_ += 32) {
      const uint16_t* key = key_ + step_ * 16;
      _tile_loadd(4, query_ + step_, dim_ * 2);
      _tile_loadd(5, key, 64);
      _tile_dpbf16ps(0, 4, 5);
      if (N > 1) {
        _tile_loadd(6, key + dim_ * 16, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (N > 2) {
        _tile_loadd(7, key + dim_ * 32, 64);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (N > 3) {
        _tile_loadd(5, key + dim_ * 48, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
  }

  void finish() {
    advance(kGroup);
    _tile_stored(0, logit_, stride_ * 4);
    if (N > 1) _tile_stored(1, logit_ + 16, stride_ * 4);
    if (N > 2) _tile_stored(2, logit_ + 32, stride_ * 4);
    if (N > 3) _tile_stored(3, logit_ + 48, stride_ * 4);
  }

 private:
  const uint16_t *query_, *key_;
  int64_t dim_;
  float* logit_;
  int64_t stride_, step_ = 0;
};
