// Partial results to results: the k rows that attend_chunk.cuh wrote for a (query, head) become one.
//
//   kLanes lanes take a row of the output
//     lane j: list position of slot j -> log-sum-exp of that partial + bias -> weight e^(x - top)
//     for j = 0 .. k - 1, four loads in flight: sum += weight_j partial_j
//     add the sink, divide, round, store
//
// More than kLanes slots come in blocks, and the sum is scaled down when `top` rises. The order is that of
// the slots, whatever the schedule, so results are the same on every run. Bytes per row: k (2 D + 8 of fp16
// partials, or 4 D + 4 of fp32, gathered in whole rows) and the output once: pure memory time.
//
// Which partials: on values of alternating sign, where partials cancel, bf16 ones broke the bound of the
// tolerance rule up to threefold. fp16 ones with a factor per row keep it for bf16 problems, and are their
// default; fp16 problems expect more of themselves and take fp32 partials, as fp32 problems do
// (docs/kernels.md has the numbers).
#pragma once

#include "cuda/attend_chunk.cuh"

namespace resona::cuda {

template <class T, class P, int kHeadDim>
struct AttendMergeConfig {
  using Element = T;
  using Partial = P;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kLanes = kHeadDim <= 64 ? 16 : 32;
  static constexpr int kSlices = kHeadDim / (4 * kLanes);  // a lane has 4 neighbouring elements of each
  static constexpr int kGroups = kWarpSize / kLanes;       // rows of a warp
  static constexpr int kUnroll = 4;
  static constexpr int kRegisterCap = 96;
  static constexpr int kMinBlocks = 65536 / (kThreads * kRegisterCap);
};

template <class T, class P>
struct AttendMergeParams {
  AttendParams<T> attend;
  const int32_t* position;     // [slots]
  const P* partial;            // [kv_count, slots, G, partial_pitch(D)]
  const float* partial_lse;    // [kv_count, slots, G]
  const float* partial_scale;  // [kv_count, slots, G], of fp16
  int64_t slots;               // B T R k
  int kv_first, kv_count;      // of the Hkv / R key/value heads of each list

  // Of the heads that this launch works on, number i of a query's.
  __device__ __forceinline__ int heads() const { return attend.retrieval_heads * kv_count * attend.group(); }
  __device__ __forceinline__ int head(int i) const {
    const int of_list = kv_count * attend.group(), before = kv_first * attend.group();
    return i / of_list * (attend.heads / attend.retrieval_heads) + before + i % of_list;
  }
};

__device__ __forceinline__ float4 load_four(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}
template <class T>
__device__ __forceinline__ float4 load_four(const T* from) {
  union {
    uint2 words;
    T at[4];
  } x;
  x.words = *reinterpret_cast<const uint2*>(from);
  return make_float4(to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3]));
}

__device__ __forceinline__ void store_four(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
template <class T>
__device__ __forceinline__ void store_four(T* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_16(T(), x.x, x.y), pack_16(T(), x.z, x.w));
}

// One slot of a row as its lane sees it: `row` of the partials and its factor, -1 if the slot adds nothing.
struct MergeSlot {
  int64_t row;
  float logit, scale;
};

template <class T, class P>
__device__ __forceinline__ MergeSlot merge_slot(const AttendMergeParams<T, P>& p, int64_t query, int head,
                                                int64_t j) {
  const AttendParams<T>& a = p.attend;
  if (j >= a.top_k) return {-1, -kInfinity, 1};
  const int group = a.group(), kv_head = head / group, retrieval_head = a.retrieval_head(kv_head);
  const int64_t slot = (query * a.retrieval_heads + retrieval_head) * a.top_k + j;
  const int32_t position = p.position[slot];
  if (position < 0) return {-1, -kInfinity, 1};
  const int kv_in_list = kv_head - retrieval_head * (a.kv_heads / a.retrieval_heads) - p.kv_first;
  const int64_t row = (kv_in_list * p.slots + position) * group + head % group;
  const float logit = with_bias(p.partial_lse[row], slot_bias(a, slot, retrieval_head));
  return {logit == -kInfinity ? -1 : row, logit, sizeof(P) == 2 ? p.partial_scale[row] : 1};
}

template <class Config>
struct MergeSum {
  float top, total;
  float4 sum[Config::kSlices];
};

__device__ __forceinline__ void scale_four(float4& x, float by) {
  x.x *= by, x.y *= by, x.z *= by, x.w *= by;
}

__device__ __forceinline__ void add_four(float4& sum, float weight, float4 x) {
  sum.x = __fmaf_rn(weight, x.x, sum.x), sum.y = __fmaf_rn(weight, x.y, sum.y);
  sum.z = __fmaf_rn(weight, x.z, sum.z), sum.w = __fmaf_rn(weight, x.w, sum.w);
}

// Adds up to kLanes slots; `own` is the lane's.
template <class Config, class T, class P>
__device__ __forceinline__ void merge_block(const AttendMergeParams<T, P>& p, MergeSlot own, int count,
                                            MergeSum<Config>& to) {
  const int lane = threadIdx.x % Config::kLanes, pitch = partial_pitch(p.attend.head_dim);
  float top = own.logit;
#pragma unroll
  for (int distance = Config::kLanes / 2; distance > 0; distance /= 2)
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
  top = fmaxf(top, to.top);
  const float reference = top == -kInfinity ? 0 : top, decay = exp_of(to.top - reference);
  const float own_weight = exp_of(own.logit - reference);
  to.top = top;
  to.total *= decay;
#pragma unroll
  for (int i = 0; i < Config::kSlices; ++i) scale_four(to.sum[i], decay);
  for (int j = 0; j < count; j += Config::kUnroll) {
    float4 x[Config::kUnroll][Config::kSlices];
    float weight[Config::kUnroll], factor[Config::kUnroll];
    bool used[Config::kUnroll];
#pragma unroll
    for (int u = 0; u < Config::kUnroll; ++u) {
      weight[u] = __shfl_sync(kAllLanes, own_weight, j + u, Config::kLanes);
      factor[u] =
          sizeof(P) == 2 ? __shfl_sync(kAllLanes, own_weight * own.scale, j + u, Config::kLanes) : weight[u];
      const int64_t row = __shfl_sync(kAllLanes, own.row, j + u, Config::kLanes);
      used[u] = row >= 0;
#pragma unroll
      for (int i = 0; i < Config::kSlices; ++i) {
        const int column = 4 * (i * Config::kLanes + lane);
        x[u][i] =
            used[u] && column < pitch ? load_four(p.partial + row * pitch + column) : make_float4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int u = 0; u < Config::kUnroll; ++u) {
      if (!used[u]) continue;
      to.total += weight[u];
#pragma unroll
      for (int i = 0; i < Config::kSlices; ++i) add_four(to.sum[i], factor[u], x[u][i]);
    }
  }
}

template <class Config, class T>
__device__ __forceinline__ void store_merged(const AttendParams<T>& a, int64_t row,
                                             const MergeSum<Config>& merged, RowEnd end) {
  const int lane = threadIdx.x % Config::kLanes;
  T* to = a.out + row * a.head_dim;
#pragma unroll
  for (int i = 0; i < Config::kSlices; ++i) {
    const int column = 4 * (i * Config::kLanes + lane);
    const float4 sum = merged.sum[i];
    const float4 x = make_float4(scaled(sum.x, end.factor), scaled(sum.y, end.factor),
                                 scaled(sum.z, end.factor), scaled(sum.w, end.factor));
    if (a.vector) {
      if (column < a.head_dim) store_four(to + column, x);
      continue;
    }
    const float elements[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + e < a.head_dim) from_float(elements[e], to[column + e]);
  }
  if (lane == 0) a.lse[row] = end.lse;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_merge_kernel(AttendMergeParams<typename Config::Element, typename Config::Partial> p) {
  const auto& a = p.attend;
  const int lane = threadIdx.x % Config::kLanes;
  const int heads = p.heads();
  const int64_t rows = a.batch * a.queries * heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Config::kWarps * Config::kGroups;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * Config::kWarps + threadIdx.x / kWarpSize;
  ptx::griddepcontrol_wait();
  for (int64_t first = warp * Config::kGroups; first < rows; first += step) {
    const int64_t row = first + threadIdx.x % kWarpSize / Config::kLanes;
    const bool exists = row < rows;  // its lanes take part in the shuffles of the others
    const int64_t query = (exists ? row : first) / heads;
    const int head = p.head(static_cast<int>((exists ? row : first) % heads));
    MergeSum<Config> merged{-kInfinity, 0, {}};
    for (int64_t j = 0; j < a.top_k; j += Config::kLanes) {
      const int64_t left = a.top_k - j;
      merge_block<Config>(p, merge_slot(p, query, head, j + lane),
                          left < Config::kLanes ? static_cast<int>(left) : Config::kLanes, merged);
    }
    const float sink = a.sink ? a.sink[head] : -kInfinity;
    if (exists)
      store_merged<Config>(a, query * a.heads + head, merged, end_with_sink(merged.top, merged.total, sink));
  }
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, element of the partials, D at most).
#define RESONA_ATTEND_MERGE_INSTANCES(X) \
  X(BFloat16, float, 64)                 \
  X(BFloat16, float, 128)                \
  X(BFloat16, float, 256)                \
  X(BFloat16, Half, 64)                  \
  X(BFloat16, Half, 128)                 \
  X(BFloat16, Half, 256)                 \
  X(Half, float, 64)                     \
  X(Half, float, 128)                    \
  X(Half, float, 256)                    \
  X(Half, Half, 64)                      \
  X(Half, Half, 128)                     \
  X(Half, Half, 256)                     \
  X(float, float, 64)                    \
  X(float, float, 128)                   \
  X(float, float, 256)

}  // namespace resona::cuda
