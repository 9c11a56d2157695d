// One token of prefix linear attention, in place: state += phi(k) v^T, out = phi(q) state / (phi(q)
// normalizer + 1e-12).
//
//   a block takes a sequence and head
//     phi(q), phi(k) -> shared memory
//     lanes along the values, groups of them along the features: read, add, write, multiply by phi(q)
//     the normalizer likewise; groups added up in order
//
// Bytes: the state read and written once, 140 KiB at f = 16 and 64 values, which is what the time is.
#pragma once

#include <cmath>

#include "cuda/attend_params.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

struct PrefixStepConfig {
  static constexpr int kThreads = 256;
  static constexpr int kRegisterCap = 64;
  static constexpr int kMostFeatureDim = 32,
                       kMostFeatures = 1 + kMostFeatureDim + kMostFeatureDim * kMostFeatureDim;
};

template <class T>
struct PrefixStepParams {
  HeadRows<const T> query, key, value;  // [B, 1, H, f] and [B, 1, H, V]
  const uint8_t* mask;                  // [B] zero: no token; null: all
  HeadRows<T> out;                      // [B, 1, H, V]
  float *state, *normalizer;            // [B, H, F, V] and [B, H, F]
  int heads, feature_dim, value_dim;
  int lanes;            // power of two that holds the values
  float first, second;  // factors of phi: sqrt(scale), scale / sqrt(2)
};

struct PrefixStepStorage {
  float query[PrefixStepConfig::kMostFeatureDim], key[PrefixStepConfig::kMostFeatureDim];
  float query_features[PrefixStepConfig::kMostFeatures], key_features[PrefixStepConfig::kMostFeatures];
  float sums[PrefixStepConfig::kThreads], denominators[PrefixStepConfig::kThreads];
};

template <class T>
__device__ __forceinline__ float step_feature(const PrefixStepParams<T>& p, const float* x, int row) {
  const int f = p.feature_dim, second = row - 1 - f;
  if (row == 0) return 1;
  return second < 0 ? p.first * x[row - 1] : p.second * (x[second / f] * x[second % f]);
}

template <class T>
__device__ __forceinline__ void write_step_features(const PrefixStepParams<T>& p, int64_t batch, int64_t head,
                                                    int features, PrefixStepStorage& s) {
  const int thread = threadIdx.x;
  if (thread < p.feature_dim) {
    s.query[thread] = to_float(p.query.at(batch, 0, head)[thread]);
    s.key[thread] = to_float(p.key.at(batch, 0, head)[thread]);
  }
  __syncthreads();  // query and key are there
  for (int row = thread; row < features; row += PrefixStepConfig::kThreads) {
    s.query_features[row] = step_feature(p, s.query, row);
    s.key_features[row] = step_feature(p, s.key, row);
  }
  __syncthreads();  // features are written
}

template <class T>
__global__ void __launch_bounds__(PrefixStepConfig::kThreads) prefix_step_kernel(PrefixStepParams<T> p) {
  RESONA_SHARED(PrefixStepStorage, s);
  const int64_t batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int thread = threadIdx.x, f = p.feature_dim, features = 1 + f + f * f;
  const int column = thread % p.lanes, group = thread / p.lanes,
            groups = PrefixStepConfig::kThreads / p.lanes;
  T* out = p.out.at(batch, 0, head);
  if (p.mask != nullptr && p.mask[batch] == 0) {
    if (thread < p.value_dim) from_float(0, out[thread]);
    return;
  }
  write_step_features(p, batch, head, features, s);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * features;
  float sum = 0, denominator = 0;
  if (column < p.value_dim) {
    const float value = to_float(p.value.at(batch, 0, head)[column]);
    float* state = p.state + row * p.value_dim + column;
#pragma unroll 4
    for (int r = group; r < features; r += groups) {
      const float x = state[static_cast<int64_t>(r) * p.value_dim] + s.key_features[r] * value;
      state[static_cast<int64_t>(r) * p.value_dim] = x;
      sum += s.query_features[r] * x;
    }
  }
  for (int r = thread; r < features; r += PrefixStepConfig::kThreads) {
    const float x = p.normalizer[row + r] + s.key_features[r];
    p.normalizer[row + r] = x;
    denominator += s.query_features[r] * x;
  }
  s.sums[thread] = sum, s.denominators[thread] = denominator;
  for (int half = PrefixStepConfig::kThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // both of a pair are written
    if (thread >= half) continue;
    if (half >= p.lanes) s.sums[thread] += s.sums[thread + half];
    s.denominators[thread] += s.denominators[thread + half];
  }
  __syncthreads();  // the sums are complete
  if (thread < p.value_dim) from_float(s.sums[thread] / (s.denominators[0] + 1e-12f), out[thread]);
}

}  // namespace resona::cuda
