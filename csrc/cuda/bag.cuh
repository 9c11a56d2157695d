// The best 4 P (score, chunk) pairs of a row, unsorted, P in the registers of each of the four lanes that
// share the row's accumulators. All four know the worst pair, so a newcomer costs one comparison, and
// replacing the worst costs P comparisons and four shuffles. The order is total (score descending, chunk
// ascending): what a bag ends with does not depend on the order of arrival.
#pragma once

#include <limits>

#include "cuda/device.cuh"

namespace resona::cuda {

constexpr int kQuad = 4;  // lanes of a row in an mma accumulator
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int kNoChunk = std::numeric_limits<int>::max();
constexpr float kNoScore = std::numeric_limits<float>::quiet_NaN();  // enters no bag

__device__ __forceinline__ bool ranks_above(float score, int chunk, float other_score, int other_chunk) {
  return score > other_score || (score == other_score && chunk < other_chunk);
}

template <int kPerLane>
struct Bag {
  static constexpr int kSize = kQuad * kPerLane;
  float score[kPerLane];
  int chunk[kPerLane];
  float worst;  // of the row
  int worst_chunk;

  // An empty slot is a pair below every other, and unlike every other empty one.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      score[i] = kLowest;
      chunk[i] = kNoChunk - static_cast<int>(threadIdx.x % kQuad) * kPerLane - i;
    }
    find_worst();
  }

  __device__ __forceinline__ void find_worst() {
    worst = score[0], worst_chunk = chunk[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) take_if_worse(score[i], chunk[i]);
#pragma unroll
    for (int distance = 1; distance < kQuad; distance *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, worst, distance);
      const int other_chunk = __shfl_xor_sync(kAllLanes, worst_chunk, distance);
      take_if_worse(other, other_chunk);
    }
  }

  // All lanes of the warp call; the four of a row with the same pair.
  __device__ __forceinline__ void offer(float x, int at) {
    const bool enters = ranks_above(x, at, worst, worst_chunk);
    if (!__any_sync(kAllLanes, enters)) return;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool here = enters && score[i] == worst && chunk[i] == worst_chunk;
      score[i] = here ? x : score[i];
      chunk[i] = here ? at : chunk[i];
    }
    find_worst();
  }

 private:
  __device__ __forceinline__ void take_if_worse(float x, int at) {
    const bool worse = ranks_above(worst, worst_chunk, x, at);
    worst = worse ? x : worst;
    worst_chunk = worse ? at : worst_chunk;
  }
};

}  // namespace resona::cuda
