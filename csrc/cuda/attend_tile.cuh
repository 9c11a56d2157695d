// The tile that attention kernels are made of: 16 query rows of a warp against up to kKeys keys in shared
// memory.
//
//   Scores s = Q K^T     m16n8k16 on tensor cores, operands by ldmatrix
//   softmax              against the running peak of each row, in registers
//   Output o += P V      scores rounded to 16 bits are the left operand as they stand
//
// A lane holds elements of rows g and g + 8 (g = lane / 4): scores of keys 8 n + 2 t + {0, 1} and kRun
// neighbouring columns of o (t = lane % 4). This file holds the 16-bit tile and what it shares with the
// fp32 tile of attend_tile_fp32.cuh: its rows, its softmax and its way out of the registers.
#pragma once

#include <cmath>

#include "cuda/device.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ex2.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

constexpr float kInfinity = INFINITY;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp_of(float x) { return ptx::ex2_approx_ftz_f32(x * kLog2E); }

// ---- rows in shared memory

// Rows of kDim elements. The 16-byte pieces of a row are permuted by its number, so that pieces of the same
// column of eight rows lie in different banks.
template <class T, int kDim>
struct TileRows {
  static constexpr int kPieceSize = 16 / sizeof(T);
  static constexpr int kPieces = kDim / kPieceSize;
  static constexpr int kRowBytes = kDim * sizeof(T);
  static_assert(kPieces % 8 == 0, "the permutation needs rows of whole 128 bytes");
  unsigned char* data;

  __device__ __forceinline__ unsigned char* piece(int row, int piece) const {
    return data + row * kRowBytes + ((piece ^ (row & 7)) * 16);
  }
};

// A piece of a row of `dim` elements, zeros beyond it; `exists` is false for a row of zeros. With `vector`
// the copy is asynchronous and belongs to the thread's next group.
template <class T>
__device__ __forceinline__ void load_piece(unsigned char* to, const T* row, int first, int dim, bool exists,
                                           bool vector) {
  if (vector) {
    const bool inside = exists && first < dim;
    ptx::cp_async_cg_16(to, inside ? row + first : row, inside ? 16 : 0);
    return;
  }
  Pack<T, true> pack;
  pack.clear();
#pragma unroll
  for (int i = 0; i < Pack<T, true>::kSize; ++i)
    if (exists && first + i < dim) pack.at[i] = row[first + i];
  *reinterpret_cast<uint4*>(to) = pack.words;
}

// ---- products

__device__ __forceinline__ void multiply_16(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b_low,
                                            uint32_t b_high) {
  const uint32_t b[2] = {b_low, b_high};
  ptx::mma_m16n8k16_bf16(c, a, b);
}
__device__ __forceinline__ void multiply_16(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b_low,
                                            uint32_t b_high) {
  const uint32_t b[2] = {b_low, b_high};
  ptx::mma_m16n8k16_f16(c, a, b);
}

__device__ __forceinline__ uint32_t pack_16(BFloat16, float low, float high) {
  return ptx::cvt_rn_bf16x2_f32(high, low);
}
__device__ __forceinline__ uint32_t pack_16(Half, float low, float high) {
  return ptx::cvt_rn_f16x2_f32(high, low);
}

template <class T, int kHeadDim, int kMostKeys>
struct AttendTile {
  using Element = T;
  using Rows = TileRows<T, kHeadDim>;
  static constexpr int kDim = kHeadDim, kKeys = kMostKeys;
  static constexpr int kRun = 2;
  static constexpr int kRuns = kDim / 8;
  static_assert(kKeys % 16 == 0);
  // Logits are kept in units of log 2: exp2 of a difference is one instruction.
  static constexpr float kUnitsPerNat = kLog2E, kLog2PerUnit = 1, kNatsPerUnit = kLn2;

  struct Scores {
    float at[kKeys / 8][4];  // row g: 0, 1; row g + 8: 2, 3
  };
  struct Output {
    float at[kRuns][2 * kRun];  // row g: 0, 1; row g + 8: 2, 3
  };

  __device__ static __forceinline__ int column(int run) { return 8 * run + threadIdx.x % 4 * 2; }

  // Of query rows first_row + {0 .. 15} and the first `keys` keys, rounded up to 16.
  __device__ static __forceinline__ void multiply_keys(Scores& s, Rows query, int first_row, Rows key,
                                                       int keys) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) s.at[n][0] = s.at[n][1] = s.at[n][2] = s.at[n][3] = 0;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, query.piece(first_row + lane % 16, 2 * d + lane / 16));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        if (16 * n >= keys) continue;
        uint32_t b[4];
        ptx::ldmatrix_x4(b, key.piece(16 * n + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
        multiply_16(T(), s.at[2 * n], a, b[0], b[1]);
        multiply_16(T(), s.at[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  __device__ static __forceinline__ void add_values(Output& o, const Scores& weights, Rows value, int keys) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      if (16 * n >= keys) continue;
      const float (&left)[4] = weights.at[2 * n], (&right)[4] = weights.at[2 * n + 1];
      const uint32_t a[4] = {pack_16(T(), left[0], left[1]), pack_16(T(), left[2], left[3]),
                             pack_16(T(), right[0], right[1]), pack_16(T(), right[2], right[3])};
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, value.piece(16 * n + lane % 16, 2 * d + lane / 16));
        multiply_16(T(), o.at[2 * d], a, b[0], b[1]);
        multiply_16(T(), o.at[2 * d + 1], a, b[2], b[3]);
      }
    }
  }
};

// ---- softmax

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The running state of rows g and g + 8. `total` is the lane's own share.
struct SoftmaxRows {
  float peak[2], total[2];
};

template <class Tile>
__device__ __forceinline__ void clear(SoftmaxRows& rows, typename Tile::Output& o) {
#pragma unroll
  for (int h = 0; h < 2; ++h) rows.peak[h] = -kInfinity, rows.total[h] = 0;
#pragma unroll
  for (int run = 0; run < Tile::kRuns; ++run)
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRun; ++i) o.at[run][i] = 0;
}

// Products to logits; columns from `keys` on, of the last block of 16, to -inf. `scale` is in the tile's
// units.
template <class Tile>
__device__ __forceinline__ void scale_scores(typename Tile::Scores& s, float scale, int keys) {
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s.at[n][i] *= scale;
  if (keys % 16 == 0) return;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * n + 2 * t + i % 2 >= keys) s.at[n][i] = -kInfinity;
}

// Logits to weights relative to the highest logit so far; what was accumulated under a lower one is scaled
// down. A row whose logits are all -inf keeps weights of zero: -inf is never subtracted from itself. A NaN
// is no peak, and reaches its row through its own weight.
template <class Tile>
__device__ __forceinline__ void softmax(typename Tile::Scores& s, SoftmaxRows& rows, typename Tile::Output& o,
                                        int keys, bool first) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float peak = -kInfinity;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n)
      if (n / 2 * 16 < keys) peak = fmaxf(peak, fmaxf(s.at[n][2 * h], s.at[n][2 * h + 1]));
    peak = fmaxf(quad_max(peak), rows.peak[h]);
    const float reference = peak == -kInfinity ? 0 : peak;
    float total = 0;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
      if (n / 2 * 16 >= keys) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.at[n][2 * h + e];
        x = ptx::ex2_approx_ftz_f32((x - reference) * Tile::kLog2PerUnit);
        total += x;
      }
    }
    if (!first) {
      const float decay = ptx::ex2_approx_ftz_f32((rows.peak[h] - reference) * Tile::kLog2PerUnit);
      rows.total[h] *= decay;
#pragma unroll
      for (int run = 0; run < Tile::kRuns; ++run)
#pragma unroll
        for (int i = 0; i < Tile::kRun; ++i) o.at[run][h * Tile::kRun + i] *= decay;
    }
    rows.total[h] += total;
    rows.peak[h] = peak;
  }
}

// What a row's accumulators are multiplied with, and its natural log-sum-exp: 0 and -inf if it has no
// weight.
struct RowEnd {
  float factor, lse;
};

template <class Tile>
__device__ __forceinline__ RowEnd end_of_row(const SoftmaxRows& rows, int h) {
  const float total = quad_sum(rows.total[h]);
  if (total == 0) return {0, -kInfinity};
  return {1 / total, rows.peak[h] * Tile::kNatsPerUnit + std::log(total)};
}

// Adds a sink (-inf: none) to a sum of `total` times e^top.
__device__ __forceinline__ RowEnd end_with_sink(float top, float total, float sink) {
  const float highest = sink > top ? sink : top;
  const float reference = highest == -kInfinity ? 0 : highest;
  const float decay = exp_of(top - reference), sum = total * decay + exp_of(sink - reference);
  if (sum == 0) return {0, -kInfinity};
  return {decay / sum, reference + std::log(sum)};
}

// ---- the way out

__device__ __forceinline__ float scaled(float x, float factor) {
  return factor == 0 ? 0 : x * factor;  // a row without weight is zero, whatever it has met
}

template <class T>
__device__ __forceinline__ void store_run(T* to, const float (&x)[2]) {
  *reinterpret_cast<uint32_t*>(to) = pack_16(T(), x[0], x[1]);
}
__device__ __forceinline__ void store_run(float* to, const float (&x)[2]) {
  *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
}
__device__ __forceinline__ void store_run(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

// Row h of the lane's two, straight from registers: 32 bytes and more of fp32 at a time. `vector` says that
// rows are whole 16-byte pieces.
template <class Tile, class To>
__device__ __forceinline__ void store_row(To* row, const typename Tile::Output& o, int h, float factor,
                                          int dim, bool vector) {
#pragma unroll
  for (int run = 0; run < Tile::kRuns; ++run) {
    const int column = Tile::column(run);
    float x[Tile::kRun];
#pragma unroll
    for (int i = 0; i < Tile::kRun; ++i) x[i] = scaled(o.at[run][h * Tile::kRun + i], factor);
    if (vector) {
      if (column < dim) store_run(row + column, x);
      continue;
    }
#pragma unroll
    for (int i = 0; i < Tile::kRun; ++i)
      if (column + i < dim) from_float(x[i], row[column + i]);
  }
}

// The same into 16-bit rows of shared memory, from where whole rows leave in 16-byte pieces: straight from
// registers, a store would fill half sectors.
template <class Tile, class To = typename Tile::Element>
__device__ __forceinline__ void stage_row(typename Tile::Rows rows, int row, const typename Tile::Output& o,
                                          int h, float factor) {
#pragma unroll
  for (int run = 0; run < Tile::kRuns; ++run) {
    const float x[2] = {scaled(o.at[run][2 * h], factor), scaled(o.at[run][2 * h + 1], factor)};
    store_run(reinterpret_cast<To*>(rows.piece(row, run)) + threadIdx.x % 4 * 2, x);
  }
}

// The largest finite magnitude of a row.
template <class Tile>
__device__ __forceinline__ float largest_of_row(const typename Tile::Output& o, int h) {
  float largest = 0;
#pragma unroll
  for (int run = 0; run < Tile::kRuns; ++run)
#pragma unroll
    for (int i = 0; i < Tile::kRun; ++i) {
      const float x = fabsf(o.at[run][h * Tile::kRun + i]);
      largest = fmaxf(largest, x < kInfinity ? x : 0);
    }
  return quad_max(largest);
}

// A power of two that brings values up to `largest` below 2 when they are multiplied with `inverse`. Both lie
// between 2^-125 and 2^125.
struct PowerOfTwo {
  float value, inverse;
};

__device__ __forceinline__ PowerOfTwo power_of_two(float largest) {
  const unsigned exponent = __float_as_uint(largest) & 0x7f800000u;
  const unsigned low = 0x01000000u, high = 0x7e000000u;
  const unsigned bits = exponent < low ? low : exponent > high ? high : exponent;
  return {__uint_as_float(bits), __uint_as_float(0x7f000000u - bits)};
}

}  // namespace resona::cuda
