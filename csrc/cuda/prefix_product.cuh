// Matrix products of float32 numbers on tensor cores, by one warp: 16 rows and up to kMost tiles of eight
// columns, m16n8k8 on TF32.
//
// TF32 has 11 bits: an element of 16 bits is one such number exactly. Anything else becomes two, the nearest
// and the nearest to what is left, and of the four products the smallest is dropped: an error of about 2^-21
// of each product, float32 as the operator means it. So a product takes 1, 2 or 3 instructions.
#pragma once

#include "cuda/device.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/mma.cuh"

namespace resona::cuda {

template <int kPieces>
struct Tf32Pieces {
  uint32_t high, low;

  __device__ __forceinline__ explicit Tf32Pieces(float x) {
    if constexpr (kPieces == 1) {
      high = __float_as_uint(x), low = 0;
    } else {
      high = ptx::cvt_rna_tf32_f32(x);
      low = ptx::cvt_rna_tf32_f32(x - __uint_as_float(high));
    }
  }
};

// c += left right over depth [begin, end), whole steps of eight. left(row, k) of 16 rows, right(k, column) of
// 8 `tiles` columns; kLeft and kRight are the TF32 numbers that an element takes.
template <int kLeft, int kRight, int kMost, class Left, class Right>
__device__ __forceinline__ void add_product(float (&c)[kMost][4], int tiles, int begin, int end,
                                            const Left& left, const Right& right) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = begin; k < end; k += 8) {
    const Tf32Pieces<kLeft> a[4] = {Tf32Pieces<kLeft>(left(g, k + t)), Tf32Pieces<kLeft>(left(g + 8, k + t)),
                                    Tf32Pieces<kLeft>(left(g, k + t + 4)),
                                    Tf32Pieces<kLeft>(left(g + 8, k + t + 4))};
    const uint32_t a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    const uint32_t a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      if (n >= tiles) continue;
      const Tf32Pieces<kRight> b[2] = {Tf32Pieces<kRight>(right(k + t, 8 * n + g)),
                                       Tf32Pieces<kRight>(right(k + t + 4, 8 * n + g))};
      const uint32_t b_high[2] = {b[0].high, b[1].high}, b_low[2] = {b[0].low, b[1].low};
      if constexpr (kLeft == 2) ptx::mma_m16n8k8_tf32(c[n], a_low, b_high);
      if constexpr (kRight == 2) ptx::mma_m16n8k8_tf32(c[n], a_high, b_low);
      ptx::mma_m16n8k8_tf32(c[n], a_high, b_high);
    }
  }
}

template <int kMost>
__device__ __forceinline__ void clear_product(float (&c)[kMost][4]) {
#pragma unroll
  for (int n = 0; n < kMost; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
}

// Calls body(row, column, element) for the lane's own.
template <int kMost, class Body>
__device__ __forceinline__ void for_product(float (&c)[kMost][4], int tiles, const Body& body) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kMost; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) body(g + i / 2 * 8, 8 * n + 2 * t + i % 2, c[n][i]);
  }
}

}  // namespace resona::cuda
