// Inner loops of processors that multiply bfloat16 with float32 sums: products of matrices cut into tiles of
// 16 x 32 by 32 x 16, the packing that they need, and the softmax between two of them. AMX multiplies a tile
// at once; avx512_bf16 the same packed operands vector by vector. An instruction set with neither has none of
// these, and the stages do bfloat16 in float32.
#pragma once

#include <cstdint>

namespace resona::cpu {

constexpr int64_t kTileStateBytes = 64;

// Sizes of packed operands: depths are whole bricks of 32, rows and columns whole tiles of 16.
inline int64_t padded_tile(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t padded_brick(int64_t n) { return (n + 31) / 32 * 32; }

// c[m, n] = a[m, depth] * b[depth, n], added to c if `accumulate`. `a` is rows, `b` is packed.
struct TileGemm {
  int64_t m, n, depth;  // multiples of 16, 16 and 32
  const uint16_t* a;
  int64_t a_stride;
  const uint16_t* b;
  float* c;
  int64_t c_stride;
  bool accumulate;
};

// Rows of bfloat16 [count, dim], as they lie in a tensor.
struct TileRows {
  const uint16_t* data;
  int64_t stride, count, dim;
};

struct TileAttendScratch {
  static constexpr int64_t kRows = 128, kGroup = 16, kPiece = 32, kMostKeys = 128, kMostDims = 256;
  alignas(64) uint16_t query[2][kGroup * kMostDims];
  alignas(64) float logit[2][kGroup * kMostKeys];
  alignas(64) uint16_t weight[kRows * kMostKeys];
  alignas(64) float out[2][kPiece * 32];
  alignas(64) float decay[kRows];
};

// Keys and values of one chunk meet the rows that selected it; see micro/tile_attend.h. Rows may repeat.
struct TileAttend {
  int64_t row_count, key_count, dim;  // dim: padded_brick(D)
  const int32_t* rows;                // [rows_known] accumulators of these rows, then of those that come next
  int64_t rows_known;
  bool rows_spill;              // queries and accumulators do not fit the second cache
  const float* bias;            // [row_count], or null
  const uint16_t* queries;      // [.., dim] by accumulator
  const uint16_t *key, *value;  // packed
  TileRows* expected;           // two; what is fetched from memory meanwhile is taken off
  int64_t expected_per_row;     // rows of them for each row of this
  float scale;
  float *sum, *peak, *total;  // by accumulator: [.., dim], running maximum, running sum of weights
  TileAttendScratch* scratch;
};

// Weights and d logit of a tile whose rows are keys and whose columns are queries; zero beyond row_count.
struct TileColumns {
  int64_t key_count, row_count, stride;  // stride: padded_brick(row_count)
  const float *product, *gradient;       // [key_count, stride] <query, key>, <d out, value>
  uint16_t *weight, *logit_gradient;     // [key_count, stride]
  float scale;
  const float *bias, *lse, *factor, *delta;  // [row_count], as in SoftmaxBackwardTile
};

struct TileKernels {
  int64_t second_cache_bytes;  // of a core, at least, where these kernels run
  // Around the work of one thread: `saved` keeps what the tiles were configured for before.
  void (*begin)(void* saved);
  void (*end)(const void* saved);
  void (*gemm)(const TileGemm&);
  void (*pack_transposed)(const TileRows&, uint16_t* to);  // X^T: [padded_brick(dim), padded_tile(count)]
  void (*pack_rows)(const TileRows&, uint16_t* to);        // X: [padded_brick(count), padded_brick(dim)]
  void (*attend)(const TileAttend&);
  void (*softmax_backward_columns)(const TileColumns&);
  void (*store_scaled)(float factor, const float* from, uint16_t* to, int64_t n);  // to = factor * from
};

// The tiles of this thread, for as long as this lives.
class TileScope {
 public:
  explicit TileScope(const TileKernels& kernels) : kernels_(kernels) { kernels_.begin(saved_); }
  ~TileScope() { kernels_.end(saved_); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  const TileKernels& kernels_;
  alignas(64) unsigned char saved_[kTileStateBytes];
};

#if defined(RESONA_HAS_AMX_KERNELS)
extern const TileKernels amx_tiles;
#endif
#if defined(RESONA_HAS_BF16_KERNELS)
extern const TileKernels avx512_bf16_tiles;
#endif

}  // namespace resona::cpu
