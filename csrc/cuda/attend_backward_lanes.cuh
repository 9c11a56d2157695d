// Gradients of attention for chunks of a few tokens, whose lists are too short for tiles: a warp per segment
// of a list (attend_backward_params.cuh), everything in registers.
//
//   batch of items: each lane finds one, so 32 searches cost one           (persistent warps)
//   item: one key/value head of one segment
//     K, V: S rows of up to 4 or 8 in registers, kPerLane columns a lane; d K = d V = 0
//     for each 32 rows: lane i looks row i up (query, lse, delta, factor)
//       for each row                                                q, d o of the next row under way
//         <q, k_j>, <d o, v_j>: 2 S sums over lanes                 halving: 15 + 1 shuffles for 16 sums
//         weight_j, d logit_j: each by the lanes that hold the sum  then to all lanes
//         d V += weight d o,  d K += d logit q
//         d logit K -> query_partial, at the row's list position; with k = 1, times scale, the gradient
//     d K, d V -> the gradients, or the slab if the list has several segments
//
// The contract is that of attend_backward_kernel: the same parameters, the same partial results in the same
// places, one writer each and rows in order; so the kernels before and behind do not know the difference.
//
// Bytes per row and key/value head, 16-bit elements: 4 D gathered, 4 D of partial written (k = 1: 2 D of
// gradient); per item 8 S D of K, V and their gradients. Some 90 + 26 S instructions of a warp per row at
// D = 128. A tile of 64 rows by 16 keys takes as long for two rows as for 64, and seven barriers.
#pragma once

#include "cuda/attend_backward_params.cuh"
#include "cuda/attend_chunk.cuh"

namespace resona::cuda {

// An instance takes D <= 32 kPerLane and S <= kMostKeys.
template <class T, int kElementsPerLane, int kKeys>
struct AttendBackwardLanesConfig {
  using Element = T;
  static constexpr int kPerLane = kElementsPerLane;
  static constexpr int kMostKeys = kKeys;
  static constexpr int kDim = kPerLane * kWarpSize;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kMostSegment = 1024;                   // rows, as the other path has it
  static constexpr int kShare = kWarpSize / (2 * kMostKeys);  // lanes that hold one sum
  static constexpr int kRegisterCap = 240;  // where keys take most; kMinBlocks holds the others to 168
  static constexpr int kMinBlocks = kPerLane * kMostKeys >= 32 ? 2 : 3;
};

// ---- a lane's columns of a row

template <class T, int kPerLane>
struct LaneColumns {
  static constexpr int kRun = kPerLane * sizeof(T) < 16 ? kPerLane : 16 / sizeof(T);  // of one access
  struct alignas(kRun * sizeof(T)) Words {
    uint32_t at[kRun * sizeof(T) / 4];
  };
  union Run {
    Words words;
    T at[kRun];
  };
  float at[kPerLane];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : at) x = 0;
  }

  __device__ __forceinline__ void load(const T* row, int dim, bool vector) {
    const int first = threadIdx.x % kWarpSize * kPerLane;
    clear();
#pragma unroll
    for (int i = 0; i < kPerLane; i += kRun) {
      if (vector && first + i < dim) {
        Run run;
        run.words = *reinterpret_cast<const Words*>(row + first + i);
#pragma unroll
        for (int e = 0; e < kRun; ++e) at[i + e] = to_float(run.at[e]);
      }
#pragma unroll
      for (int e = i; e < i + kRun; ++e)
        if (!vector && first + e < dim) at[e] = to_float(row[first + e]);
    }
  }

  __device__ __forceinline__ void store(T* row, int dim, bool vector, float factor) const {
    const int first = threadIdx.x % kWarpSize * kPerLane;
#pragma unroll
    for (int i = 0; i < kPerLane; i += kRun) {
      Run run;
#pragma unroll
      for (int e = 0; e < kRun; ++e) from_float(at[i + e] * factor, run.at[e]);
      if (vector && first + i < dim) *reinterpret_cast<Words*>(row + first + i) = run.words;
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        if (!vector && first + i + e < dim) row[first + i + e] = run.at[e];
    }
  }

  template <class Other>
  __device__ __forceinline__ float dot(const Other& other, float sum) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum = __fmaf_rn(at[i], other.at[i], sum);
    return sum;
  }

  template <class Other>
  __device__ __forceinline__ void add(float factor, const Other& other) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) at[i] = __fmaf_rn(factor, other.at[i], at[i]);
  }
};

// Sums of kCount numbers over the lanes. At each step a lane passes on half of what it holds and keeps the
// rest: lane l ends with number l kCount / 32.
template <int kCount, int kHalf = kCount / 2>
__device__ __forceinline__ float sum_over_lanes(float (&x)[kCount]) {
  constexpr int kDistance = kHalf > 0 ? kHalf * kWarpSize / kCount : kWarpSize / kCount / 2;
  if constexpr (kHalf > 0) {
    const bool upper = threadIdx.x & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? x[i] : x[i + kHalf], kept = upper ? x[i + kHalf] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, given, kDistance);
    }
    return sum_over_lanes<kCount, kHalf / 2>(x);
  } else {
#pragma unroll
    for (int distance = kDistance; distance > 0; distance /= 2)
      x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
    return x[0];
  }
}

// ---- an item

template <class Config>
struct LaneKeys {
  using T = typename Config::Element;
  LaneColumns<T, Config::kPerLane> key[Config::kMostKeys], value[Config::kMostKeys];
  LaneColumns<float, Config::kPerLane> key_sum[Config::kMostKeys], value_sum[Config::kMostKeys];

  __device__ __forceinline__ void load(const AttendBackwardParams<T>& p, const BackwardItem& item) {
    const AttendParams<T>& a = p.attend;
#pragma unroll
    for (int j = 0; j < Config::kMostKeys; ++j) {
      key_sum[j].clear(), value_sum[j].clear();
      if (j >= a.chunk_size) continue;
      key[j].load(a.key.at(item.batch, item.token + j, item.kv_head), a.head_dim, a.vector);
      if (!p.only_sums)
        value[j].load(a.value.at(item.batch, item.token + j, item.kv_head), a.head_dim, a.vector);
    }
  }

  // To the gradient itself, to what ranges of queries add up, or to the slab.
  __device__ __forceinline__ void store(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                        const LaneColumns<float, Config::kPerLane>& sum, int j, int which,
                                        const HeadRows<T>& gradient, float factor) const {
    const AttendParams<T>& a = p.attend;
    const int pitch = partial_pitch(a.head_dim);
    const int64_t token = item.token + j;
    LaneColumns<T, Config::kPerLane> rounded;
    LaneColumns<float, Config::kPerLane> carried;
    if (item.slab >= 0) {
      float* to = p.slab + ((item.slab * 2 + which) * a.chunk_size + j) * pitch;
      sum.store(to, pitch, true, factor);
    } else if (p.carried) {
      float* to = p.carried + (p.carried_row(token, item.retrieval_head, item.kv) * 2 + which) * pitch;
      carried.load(to, pitch, true);
      carried.add(factor, sum);
      carried.store(to, pitch, true, 1);
    } else {
#pragma unroll
      for (int i = 0; i < Config::kPerLane; ++i) rounded.at[i] = sum.at[i];
      rounded.store(gradient.at(item.batch, token, item.kv_head), a.head_dim, a.vector, factor);
    }
  }
};

// A row of the item as its lane has looked it up.
struct LaneRow {
  RowEntry entry;
  int64_t head;

  __device__ __forceinline__ LaneRow of_lane(int lane) const {
    return {{__shfl_sync(kAllLanes, entry.token, lane), __shfl_sync(kAllLanes, entry.shift, lane),
             __shfl_sync(kAllLanes, entry.factor, lane), __shfl_sync(kAllLanes, entry.delta, lane)},
            __shfl_sync(kAllLanes, static_cast<int>(head), lane)};
  }
};

template <class T>
__device__ __forceinline__ LaneRow find_lane_row(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                                 int row) {
  if (row >= item.rows) return {{-1, 0, 0, 0}, 0};
  const int query_of_item = item.group.quotient(item.skipped + row);
  const RowEntry entry = row_entry(p, item, row, query_of_item, p.list[item.list + query_of_item]);
  return {entry, item.kv_head * item.group.group + item.group.remainder(item.skipped + row)};
}

template <class Config>
struct LaneTensors {
  using T = typename Config::Element;
  LaneColumns<T, Config::kPerLane> query, out_gradient;

  __device__ __forceinline__ void load(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                       const LaneRow& row) {
    const AttendParams<T>& a = p.attend;
    if (row.entry.token < 0) return;
    query.load(a.query.at(item.batch, row.entry.token, row.head), a.head_dim, a.vector);
    if (!p.only_sums)
      out_gradient.load(p.out_gradient.at(item.batch, row.entry.token, row.head), a.head_dim, a.vector);
  }
};

// One row against the keys. Its sum of weights, or of d logit, comes back in every lane.
template <class Config, class T>
__device__ __forceinline__ float backward_row(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                              LaneKeys<Config>& keys, const LaneTensors<Config>& x,
                                              const LaneRow& row, int64_t partial_row) {
  constexpr int kKeys = Config::kMostKeys, kShare = Config::kShare;
  const AttendParams<T>& a = p.attend;
  const int lane = threadIdx.x % kWarpSize, size = static_cast<int>(a.chunk_size);
  float sums[2 * kKeys];
#pragma unroll
  for (int j = 0; j < kKeys; ++j) {
    sums[j] = j < size ? x.query.dot(keys.key[j], 0) : 0;
    sums[kKeys + j] = j < size && !p.only_sums ? x.out_gradient.dot(keys.value[j], 0) : 0;
  }
  // Scores are in the lower half of the warp, the gradients of weights in the upper one.
  const float own = sum_over_lanes(sums), other = __shfl_xor_sync(kAllLanes, own, kWarpSize / 2);
  const bool lower = lane < kWarpSize / 2, counts = lane % (kWarpSize / 2) / kShare < size;
  const float logit = __fmaf_rn(lower ? own : other, a.scale, row.entry.shift);
  const float weight = counts ? exp_of(logit) * row.entry.factor : 0;
  const float gradient = counts ? weight * ((lower ? other : own) - row.entry.delta) : 0;
  if (!p.only_sums) {
    LaneColumns<float, Config::kPerLane> query_sum;
    query_sum.clear();
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      if (j >= size) continue;
      const float of_value = __shfl_sync(kAllLanes, weight, j * kShare);
      const float of_key = __shfl_sync(kAllLanes, gradient, j * kShare);
      keys.value_sum[j].add(of_value, x.out_gradient);
      keys.key_sum[j].add(of_key, x.query);
      query_sum.add(of_key, keys.key[j]);
    }
    if (p.query_partial) {
      const int pitch = partial_pitch(a.head_dim);
      query_sum.store(p.query_partial + partial_row * pitch, pitch, true, 1);
    } else {
      LaneColumns<T, Config::kPerLane> rounded;
#pragma unroll
      for (int i = 0; i < Config::kPerLane; ++i) rounded.at[i] = query_sum.at[i];
      rounded.store(p.query_gradient.at(item.batch, row.entry.token, row.head), a.head_dim, a.vector,
                    a.scale);
    }
  }
  float sum = p.only_sums ? weight : gradient;
  if (!p.row_sums) return 0;
  for (int distance = kWarpSize / 4; distance >= kShare; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

template <class Config, class T>
__device__ __forceinline__ void backward_lanes_item(const AttendBackwardParams<T>& p,
                                                    const BackwardItem& item) {
  const int lane = threadIdx.x % kWarpSize;
  LaneKeys<Config> keys;
  keys.load(p, item);
  for (int first = 0; first < item.rows; first += kWarpSize) {
    const LaneRow mine = find_lane_row(p, item, first + lane);
    const int rows = item.rows - first < kWarpSize ? item.rows - first : kWarpSize;
    LaneTensors<Config> next;
    LaneRow next_row = mine.of_lane(0);
    next.load(p, item, next_row);
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const LaneTensors<Config> tensors = next;
      const LaneRow row = next_row;
      if (r + 1 < rows) {
        next_row = mine.of_lane(r + 1);
        next.load(p, item, next_row);
      }
      const int64_t partial_row = item.partial_row + first + r;
      const bool exists = row.entry.token >= 0;
      const float sum = exists ? backward_row<Config>(p, item, keys, tensors, row, partial_row) : 0;
      if (p.row_sums && lane == 0) p.row_sums[partial_row] = sum;
    }
  }
  if (p.only_sums) return;
#pragma unroll
  for (int j = 0; j < Config::kMostKeys; ++j) {
    if (j >= p.attend.chunk_size) continue;
    keys.store(p, item, keys.key_sum[j], j, 0, p.key_gradient, p.attend.scale);
    keys.store(p, item, keys.value_sum[j], j, 1, p.value_gradient, 1);
  }
}

// ---- the kernel

template <class Config>
struct BackwardLanesStorage {
  BackwardItem items[Config::kWarps][kWarpSize];
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_backward_lanes_kernel(AttendBackwardParams<typename Config::Element> p) {
  RESONA_SHARED(BackwardLanesStorage<Config>, storage);
  ptx::griddepcontrol_wait();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  BackwardItem* items = storage.items[warp];
  const int64_t segments = p.segments(), count = segments * p.heads;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * Config::kWarps;
  // As many items a batch as leave none of the warps idle.
  const int64_t share = (count + warps - 1) / warps, batch = share < kWarpSize ? share : kWarpSize;
  for (int64_t first = (blockIdx.x * Config::kWarps + warp) * batch; first < count; first += warps * batch) {
    const int found = static_cast<int>(count - first < batch ? count - first : batch);
    __syncwarp();  // the batch before has been worked off
    if (lane < found) {
      const int64_t kv = (first + lane) / segments;
      const uint32_t segment = static_cast<uint32_t>(first + lane - kv * segments);
      const BackwardItem item =
          backward_item(p, kv, segment, find_work(p.tile_begin, p.tile_totals, p.keys, segment));
      items[lane] = item;
    }
    __syncwarp();  // items are there
#pragma unroll 1
    for (int i = 0; i < found; ++i) backward_lanes_item<Config>(p, items[i]);
  }
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, columns a lane, keys). A launch takes the first that holds rows and chunks.
#define RESONA_ATTEND_BACKWARD_LANES_INSTANCES(X) \
  X(BFloat16, 2, 8)                               \
  X(BFloat16, 4, 4)                               \
  X(BFloat16, 4, 8)                               \
  X(BFloat16, 8, 4)                               \
  X(Half, 2, 8)                                   \
  X(Half, 4, 4)                                   \
  X(Half, 4, 8)                                   \
  X(Half, 8, 4)                                   \
  X(float, 2, 8)                                  \
  X(float, 4, 4)                                  \
  X(float, 4, 8)                                  \
  X(float, 8, 4)

}  // namespace resona::cuda
