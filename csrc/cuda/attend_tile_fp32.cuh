// The attention tile of attend_tile.cuh for fp32, by FMA.
//
// Three TF32 products per term would be up to twice as fast, but split infinities into NaN (a key of -inf
// that masks its token is legal) and lose what lies below 2^-126; FMA is fp32 as the contract means it. A
// lane has the rows and keys that mma would give it, so the softmax is the same. For 4 elements of D and one
// key it has 8 FMA and little more than one load of 16 bytes. Neighbouring lanes share what they load, so
// that a warp's load takes one cycle of the SM: half the time of the FMAs, which is the bound.
#pragma once

#include "cuda/attend_tile.cuh"

namespace resona::cuda {

__device__ __forceinline__ float4 load_4(const unsigned char* piece) {
  return *reinterpret_cast<const float4*>(piece);
}

template <int kHeadDim, int kMostKeys>
struct AttendTile<float, kHeadDim, kMostKeys> {
  using Element = float;
  using Rows = TileRows<float, kHeadDim>;
  static constexpr int kDim = kHeadDim, kKeys = kMostKeys;
  static constexpr int kRun = 4;
  static constexpr int kRuns = kDim / 16;
  static_assert(kKeys % 16 == 0);
  // Logits stay in natural units: the factor of exp2 then meets the small differences, not the logits.
  static constexpr float kUnitsPerNat = 1, kLog2PerUnit = kLog2E, kNatsPerUnit = 1;

  struct Scores {
    float at[kKeys / 8][4];
  };
  struct Output {
    float at[kRuns][2 * kRun];
  };

  __device__ static __forceinline__ int column(int run) { return 16 * run + threadIdx.x % 4 * 4; }

  __device__ static __forceinline__ void multiply_keys(Scores& s, Rows query, int first_row, Rows key,
                                                       int keys) {
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) s.at[n][0] = s.at[n][1] = s.at[n][2] = s.at[n][3] = 0;
#pragma unroll 1
    for (int d = 0; d < kDim / 4; d += 2) {
      const float4 q[2][2] = {
          {load_4(query.piece(first_row + g, d)), load_4(query.piece(first_row + g, d + 1))},
          {load_4(query.piece(first_row + g + 8, d)), load_4(query.piece(first_row + g + 8, d + 1))}};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        if (n / 2 * 16 >= keys) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * n + 2 * t + e;
          const float4 k[2] = {load_4(key.piece(row, d)), load_4(key.piece(row, d + 1))};
          s.at[n][e] += dot_8(q[0], k);
          s.at[n][2 + e] += dot_8(q[1], k);
        }
      }
    }
  }

  // Each weight lies with one lane of the quad: that of key 8 n + i with lane i / 2. Key by key, since the
  // loads of two at once, D = 256, would spill registers.
  __device__ static __forceinline__ void add_values(Output& o, const Scores& weights, Rows value, int keys) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      if (n / 2 * 16 >= keys) continue;
      const float (&own)[4] = weights.at[n];
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const float low = __shfl_sync(kAllLanes, i % 2 ? own[1] : own[0], i / 2, 4);
        const float high = __shfl_sync(kAllLanes, i % 2 ? own[3] : own[2], i / 2, 4);
#pragma unroll
        for (int run = 0; run < kRuns; ++run)
          add(o.at[run], low, high, load_4(value.piece(8 * n + i, 4 * run + t)));
      }
    }
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

  __device__ static __forceinline__ void add(float (&o)[8], float low, float high, float4 v) {
    o[0] = __fmaf_rn(low, v.x, o[0]), o[1] = __fmaf_rn(low, v.y, o[1]);
    o[2] = __fmaf_rn(low, v.z, o[2]), o[3] = __fmaf_rn(low, v.w, o[3]);
    o[4] = __fmaf_rn(high, v.x, o[4]), o[5] = __fmaf_rn(high, v.y, o[5]);
    o[6] = __fmaf_rn(high, v.z, o[6]), o[7] = __fmaf_rn(high, v.w, o[7]);
  }
};

}  // namespace resona::cuda
