// The three kinds of products of the gradients, by a warp: 16 rows of the result, operands in shared memory.
//
//   multiply            a B^T   rows of Q with keys, rows of d O with values
//   multiply_transposed W^T B   weights of 64 rows, column by column, with those rows of Q or d O
//   multiply_weights    W B     a row of weights with the keys
//
// 16 bits on tensor cores, fp32 by FMA for the reasons of attend_tile_fp32.cuh. Both give a lane the rows g
// and g + 8 (g = lane / 4); of a B^T columns 8 n + 2 t + {0, 1} (t = lane % 4), of the others kRun
// neighbouring ones of every 4 kRun.
#pragma once

#include "cuda/attend_tile.cuh"
#include "cuda/attend_tile_fp32.cuh"

namespace resona::cuda {

// Weights of a tile, as operands: [rows][kKeys]. Rows are one piece apart from a multiple of 128 or 64 bytes,
// so the eight rows that ldmatrix reads at once lie in different banks.
template <class T, int kKeys>
struct WeightRows {
  static constexpr int kPitch = kKeys * sizeof(T) + 16;
  unsigned char* data;

  __device__ __forceinline__ T* at(int row, int key) const {
    return reinterpret_cast<T*>(data + row * kPitch) + key;
  }
};

// 16 rows of a B^T.
template <int kKeys>
struct ScoreTile {
  float at[kKeys / 8][4];  // row g: 0, 1; row g + 8: 2, 3

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) at[n][0] = at[n][1] = at[n][2] = at[n][3] = 0;
  }
};

// 16 rows of the other products.
template <class T, int kDim>
struct SumTile {
  static constexpr int kRun = sizeof(T) == 2 ? 2 : 4;
  static constexpr int kRuns = kDim / (4 * kRun);
  float at[kRuns][2 * kRun];  // row g, then row g + 8

  __device__ static __forceinline__ int column(int lane, int run) { return 4 * kRun * run + lane % 4 * kRun; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
#pragma unroll
      for (int i = 0; i < 2 * kRun; ++i) at[run][i] = 0;
  }
};

// ---- 16 bits

template <class T, int kDim, int kTile>
struct BackwardTile {
  using Rows = TileRows<T, kDim>;
  using Weights = WeightRows<T, kTile>;
  static constexpr int kWarpKeys = kTile / 2, kWarpDim = kDim / 2;
  using Scores = ScoreTile<kWarpKeys>;
  using Sums = SumTile<T, kWarpDim>;
  using QuerySums = SumTile<T, kWarpDim / 2>;

  // Of rows first_row + {0 .. 15} of `a` with rows first_key + {0 .. kWarpKeys - 1} of `b`, of which those
  // from `keys` on do not count.
  __device__ static __forceinline__ void multiply(int lane, Scores& s, Rows a_rows, int first_row,
                                                  Rows b_rows, int first_key, int keys) {
    const int a_offset = offset(first_row + lane % 16, lane / 16);
    const int b_offset = offset(first_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    s.clear();
#pragma unroll 4  // in full, sm_120 would spill
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, at(a_rows, a_offset, d));
#pragma unroll
      for (int n = 0; n < kWarpKeys / 16; ++n) {
        if (first_key + 16 * n >= keys) continue;
        uint32_t b[4];
        ptx::ldmatrix_x4(b, at(b_rows, b_offset, d) + 16 * n * Rows::kRowBytes);
        multiply_16(T(), s.at[2 * n], a, b[0], b[1]);
        multiply_16(T(), s.at[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // sums += (columns first_key + {0 .. 15} of the weights)^T (columns `first` ... of rows b), over `rows`.
  __device__ static __forceinline__ void multiply_transposed(int lane, Sums& sums, Weights weights,
                                                             int first_key, Rows b, int first, int rows) {
#pragma unroll 1
    for (int r = 0; r < rows; r += 16) {
      uint32_t a[4];
      ptx::ldmatrix_x4_trans(a, weights.at(r + lane % 8 + lane / 16 * 8, first_key + lane / 8 % 2 * 8));
      add_rows(lane, sums, a, b, r, first);
    }
  }

  // sums += rows first_row + {0 .. 15} of the weights times (columns `first` ... of rows b), over `keys`.
  __device__ static __forceinline__ void multiply_weights(int lane, QuerySums& sums, Weights weights,
                                                          int first_row, Rows b, int first, int keys) {
#pragma unroll 1
    for (int k = 0; k < keys; k += 16) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, weights.at(first_row + lane % 16, k + lane / 16 * 8));
      add_rows(lane, sums, a, b, k, first);
    }
  }

 private:
  // Where a piece of a row lies, and from there the piece 2 d behind it. No bit of 2 d is set in
  // `piece`, so the permutation is one XOR, and no address need be kept for each d.
  __device__ static __forceinline__ int offset(int row, int piece) {
    return row * Rows::kRowBytes + ((piece ^ (row & 7)) * 16);
  }
  __device__ static __forceinline__ unsigned char* at(Rows rows, int offset, int d) {
    return rows.data + ((offset ^ (d % 4 * 32)) + d / 4 * 128);
  }

  template <class AnySums>
  __device__ static __forceinline__ void add_rows(int lane, AnySums& sums, const uint32_t (&a)[4], Rows rows,
                                                  int row, int first) {
    const int b_offset = offset(row + lane % 16, first / 8 + lane / 16);
#pragma unroll
    for (int d = 0; d < AnySums::kRuns / 2; ++d) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, at(rows, b_offset, d));
      multiply_16(T(), sums.at[2 * d], a, b[0], b[1]);
      multiply_16(T(), sums.at[2 * d + 1], a, b[2], b[3]);
    }
  }
};

// ---- fp32

template <int kDim, int kTile>
struct BackwardTile<float, kDim, kTile> {
  using Rows = TileRows<float, kDim>;
  using Weights = WeightRows<float, kTile>;
  static constexpr int kWarpKeys = kTile / 2, kWarpDim = kDim / 2;
  using Scores = ScoreTile<kWarpKeys>;
  using Sums = SumTile<float, kWarpDim>;
  using QuerySums = SumTile<float, kWarpDim / 2>;

  __device__ static __forceinline__ void multiply(int lane, Scores& s, Rows a, int first_row, Rows b,
                                                  int first_key, int keys) {
    const int g = lane / 4, t = lane % 4;
    s.clear();
#pragma unroll 1
    for (int d = 0; d < kDim / 4; d += 2) {
      const float4 low[2] = {load_4(a.piece(first_row + g, d)), load_4(a.piece(first_row + g, d + 1))};
      const float4 high[2] = {load_4(a.piece(first_row + g + 8, d)),
                              load_4(a.piece(first_row + g + 8, d + 1))};
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; ++n) {
        if (first_key + 8 * n >= keys) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = first_key + 8 * n + 2 * t + e;
          const float4 k[2] = {load_4(b.piece(row, d)), load_4(b.piece(row, d + 1))};
          s.at[n][e] += dot_8(low, k);
          s.at[n][2 + e] += dot_8(high, k);
        }
      }
    }
  }

  __device__ static __forceinline__ void multiply_transposed(int lane, Sums& sums, Weights weights,
                                                             int first_key, Rows b, int first, int rows) {
    const int g = lane / 4;
#pragma unroll 1
    for (int r = 0; r < rows; ++r)
      add_row(lane, sums, *weights.at(r, first_key + g), *weights.at(r, first_key + g + 8), b, r, first);
  }

  __device__ static __forceinline__ void multiply_weights(int lane, QuerySums& sums, Weights weights,
                                                          int first_row, Rows b, int first, int keys) {
    const int g = lane / 4;
#pragma unroll 1
    for (int k = 0; k < keys; ++k)
      add_row(lane, sums, *weights.at(first_row + g, k), *weights.at(first_row + g + 8, k), b, k, first);
  }

 private:
  // Sums of eight, then a sum of those: one long chain of FMA would round D times.
  __device__ static __forceinline__ float dot_8(const float4 (&q)[2], const float4 (&k)[2]) {
    float sum = q[0].x * k[0].x;
    sum = __fmaf_rn(q[0].y, k[0].y, sum), sum = __fmaf_rn(q[0].z, k[0].z, sum);
    sum = __fmaf_rn(q[0].w, k[0].w, sum), sum = __fmaf_rn(q[1].x, k[1].x, sum);
    sum = __fmaf_rn(q[1].y, k[1].y, sum), sum = __fmaf_rn(q[1].z, k[1].z, sum);
    return __fmaf_rn(q[1].w, k[1].w, sum);
  }

  template <class AnySums>
  __device__ static __forceinline__ void add_row(int lane, AnySums& sums, float low, float high, Rows rows,
                                                 int row, int first) {
    const int t = lane % 4;
#pragma unroll
    for (int run = 0; run < AnySums::kRuns; ++run) {
      const float4 x = load_4(rows.piece(row, first / 4 + 4 * run + t));
      float (&to)[8] = sums.at[run];
      to[0] = __fmaf_rn(low, x.x, to[0]), to[1] = __fmaf_rn(low, x.y, to[1]);
      to[2] = __fmaf_rn(low, x.z, to[2]), to[3] = __fmaf_rn(low, x.w, to[3]);
      to[4] = __fmaf_rn(high, x.x, to[4]), to[5] = __fmaf_rn(high, x.y, to[5]);
      to[6] = __fmaf_rn(high, x.z, to[6]), to[7] = __fmaf_rn(high, x.w, to[7]);
    }
  }
};

// Columns `first` ... of row h of the lane's two, below `dim`, times `factor`; added to what is there, or
// not. `vector`: runs begin on their own borders and none is cut.
template <class To, class Sums>
__device__ __forceinline__ void store_sums(int lane, To* row, const Sums& sums, int h, float factor,
                                           int first, int dim, bool vector) {
#pragma unroll
  for (int run = 0; run < Sums::kRuns; ++run) {
    const int column = first + Sums::column(lane, run);
    float x[Sums::kRun];
#pragma unroll
    for (int i = 0; i < Sums::kRun; ++i) x[i] = sums.at[run][h * Sums::kRun + i] * factor;
    if (vector) {
      if (column < dim) store_run(row + column, x);
      continue;
    }
#pragma unroll
    for (int i = 0; i < Sums::kRun; ++i)
      if (column + i < dim) from_float(x[i], row[column + i]);
  }
}

template <class Sums>
__device__ __forceinline__ void add_sums(int lane, float* row, const Sums& sums, int h, float factor,
                                         int first, int dim) {
#pragma unroll
  for (int run = 0; run < Sums::kRuns; ++run) {
    const int column = first + Sums::column(lane, run);
    if (column >= dim) continue;
#pragma unroll
    for (int i = 0; i < Sums::kRun; ++i) row[column + i] += sums.at[run][h * Sums::kRun + i] * factor;
  }
}

// The lane's own elements of a row that it wrote before.
template <class Sums>
__device__ __forceinline__ void load_sums(int lane, Sums& sums, const float* row, int h, int first, int dim) {
#pragma unroll
  for (int run = 0; run < Sums::kRuns; ++run) {
    const int column = first + Sums::column(lane, run);
    if (column >= dim) continue;
#pragma unroll
    for (int i = 0; i < Sums::kRun; ++i) sums.at[run][h * Sums::kRun + i] = row[column + i];
  }
}

}  // namespace resona::cuda
