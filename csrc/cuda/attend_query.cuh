// Attention, query-stationary: every row gathers the keys and values of the chunks that it selected. One
// launch, no index, no workspace; any shape, dtype, stride and selection. The path for small chunks, for few
// queries, and for whatever no other path takes.
//
//   a team of 8, 16 or 32 lanes takes a query and up to kHeads heads of a group
//     for each tile of its k S keys, chunk borders or not
//       indices of the tile after this one           one lane per key, on their way during the tile
//       key rows, value rows -> registers            all loads of the tile before the first use
//       dots: 8 elements per lane, FMA               then reduce-scatter: lane i ends with key i
//       softmax against the running peak             one exponential per key
//       output = decay * output + weights * values   a weight is broadcast by one shuffle
//   `splits` teams of a block may share the keys of a row: partial results meet in shared memory
//   sink, division, out and lse
//
// Bytes: 4 D + 4 D k S / kHeads per row of the output in 16-bit types, which for tiny chunks is next to what
// must be read anyway; 16 lanes times 16 bytes are one key row at D = 128. In flight per lane: 128 bytes of
// keys and as many of values. Rows of two teams in a warp are independent, so no barrier stands in the loop.
//
// There are two inner loops. This one has no minimum of keys or heads and computes in fp32, so it takes
// float32, unaligned rows and rows of a few keys. attend_query_mma.cuh puts 16 keys on a tensor-core tile and
// takes the rest: at a hundred keys per row, multiplying here would cost more than loading.
#pragma once

#include "cuda/attend_query_row.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

// Sixteen-byte loads want AttendParams::vector. Rows hold at most kDim elements.
template <class T, int kLanesPerRow, int kHeadsPerRow, bool kVectorLoads>
struct AttendQueryConfig {
  using Element = T;
  static constexpr int kLanes = kLanesPerRow;
  static constexpr int kHeads = kHeadsPerRow;
  static constexpr bool kVector = kVectorLoads;
  static constexpr int kThreads = 128;
  static constexpr int kTeams = kThreads / kLanes;
  static constexpr int kPerLane = 8;
  static constexpr int kDim = kLanes * kPerLane;
  static constexpr int kPack = Pack<T, kVector>::kSize;
  static constexpr int kPacks = kPerLane / kPack;
  static constexpr int kTile = 32 / (kPacks * (kVector ? 4 : 1));  // keys: 32 registers of them
  static constexpr int kSplitBytes = (kThreads - kLanes) * kHeads * (kPerLane + 2) * 4;  // if splits > 1
  static constexpr int kRegisterCap = 168;
  static constexpr int kMinBlocks = kHeads == 1 ? 4 : 3;
  static_assert(kTile <= kLanes && (kTile & (kTile - 1)) == 0, "every key of a tile has a lane");
};

// The elements of a row that a lane owns; packs of neighbouring lanes lie side by side.
template <class Config>
struct QueryPacks {
  using T = typename Config::Element;
  Pack<T, Config::kVector> at[Config::kPacks];

  static __device__ __forceinline__ int element(int pack) {
    return (pack * Config::kLanes + static_cast<int>(threadIdx.x) % Config::kLanes) * Config::kPack;
  }

  // Null: zeros.
  __device__ __forceinline__ void load(const T* row, int dim) {
#pragma unroll
    for (int i = 0; i < Config::kPacks; ++i) {
      if (row == nullptr || element(i) >= dim)
        at[i].clear();
      else if constexpr (Config::kVector)
        at[i].words = ptx::ld_global_v4(row + element(i));
      else
        at[i].load(row + element(i));
    }
  }

  __device__ __forceinline__ float value(int i) const {
    return to_float(at[i / Config::kPack].at[i % Config::kPack]);
  }
};

// Sums x[0..kCount) over the lanes of a team; lane l returns the sum of x[l % kCount].
template <int kLanes, int kCount>
__device__ __forceinline__ float reduce_scatter(float (&x)[kCount]) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
    }
  }
#pragma unroll
  for (int distance = kCount; distance < kLanes; distance *= 2)
    x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
  return x[0];
}

template <class Config>
using QueryState = QueryPartial<Config::kHeads, Config::kPerLane>;

// One tile: the lane's key is number lane % kTile of it. The queries of the team come in packs.
template <class Config, class T>
__device__ __forceinline__ void attend_query_tile(const AttendParams<T>& p, const QueryRow& row,
                                                  const QueryKey& key,
                                                  const QueryPacks<Config> (&query)[Config::kHeads],
                                                  QueryState<Config>& state) {
  constexpr int kLanes = Config::kLanes, kTile = Config::kTile, kHeads = Config::kHeads;
  QueryPacks<Config> keys[kTile], values[kTile];
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    const int token = __shfl_sync(kAllLanes, key.token, j, kLanes);
    keys[j].load(token < 0 ? nullptr : p.key.at(row.batch, token, row.kv_head), p.head_dim);
    values[j].load(token < 0 ? nullptr : p.value.at(row.batch, token, row.kv_head), p.head_dim);
  }
  float dots[kHeads][kTile] = {};
#pragma unroll
  for (int j = 0; j < kTile; ++j)
#pragma unroll
    for (int i = 0; i < Config::kPerLane; ++i)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) dots[h][j] += query[h].value(i) * keys[j].value(i);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float dot = reduce_scatter<kLanes>(dots[h]);
    const float logit = key.token < 0 ? -kInfinity : dot * p.scale + key.bias;
    float peak = logit;
#pragma unroll
    for (int distance = 1; distance < kTile; distance *= 2)
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, distance));
    peak = fmaxf(peak, state.peak[h]);
    const float weight = exp_of(logit - safe_peak(peak)), decay = exp_of(state.peak[h] - safe_peak(peak));
    state.peak[h] = peak, state.total[h] = state.total[h] * decay + weight;
#pragma unroll
    for (int i = 0; i < Config::kPerLane; ++i) state.value[h][i] *= decay;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const float shared = __shfl_sync(kAllLanes, weight, j, kLanes);
#pragma unroll
      for (int i = 0; i < Config::kPerLane; ++i) state.value[h][i] += shared * values[j].value(i);
    }
  }
}

// The keys of a row, tile by tile: `keys` is the list of the lane's own.
template <class Config, class T>
__device__ __forceinline__ void attend_listed_keys(const AttendParams<T>& p, const QueryRow& row,
                                                   QueryKeys keys, QueryState<Config>& state) {
  state.clear();
  if (!__any_sync(kAllLanes, keys.eligible > 0)) return;
  QueryPacks<Config> query[Config::kHeads];
#pragma unroll
  for (int h = 0; h < Config::kHeads; ++h)
    query[h].load(h < row.heads ? p.query.at(row.batch, row.query, row.head + h) : nullptr, p.head_dim);
  QueryKey next = keys.next();
  for (bool more = true; more;) {
    const QueryKey key = next;
    more = __any_sync(kAllLanes, keys.more());
    next = keys.next();  // on its way while the tile is worked on
    if (__any_sync(kAllLanes, key.token >= 0)) attend_query_tile<Config>(p, row, key, query, state);
  }
}

// Every `splits`-th tile of a row, beginning with number `split`.
template <class Config, class T>
__device__ __forceinline__ void attend_query_keys(const AttendParams<T>& p, const QueryRow& row, int split,
                                                  int splits, QueryState<Config>& state) {
  constexpr int kTile = Config::kTile;
  const int lane = threadIdx.x % Config::kLanes;
  attend_listed_keys<Config>(p, row, query_keys(p, row, split * kTile + lane % kTile, splits * kTile), state);
}

template <class Config, class T>
__device__ __forceinline__ void write_query_row(const AttendParams<T>& p, const QueryRow& row,
                                                const QueryState<Config>& state) {
  const int lane = threadIdx.x % Config::kLanes;
#pragma unroll
  for (int h = 0; h < Config::kHeads; ++h) {
    float total = state.total[h];
#pragma unroll
    for (int distance = 1; distance < Config::kTile; distance *= 2)
      total += __shfl_xor_sync(kAllLanes, total, distance);
    if (h >= row.heads) continue;
    const RowEnd end = end_of_query(p, row.head + h, state.peak[h], total);
    const int64_t at = (row.batch * p.queries + row.query) * p.heads + row.head + h;
    if (lane == 0) p.lse[at] = end.lse;
#pragma unroll
    for (int i = 0; i < Config::kPacks; ++i) {
      const int e = QueryPacks<Config>::element(i);
      Pack<T, Config::kVector> pack;
#pragma unroll
      for (int j = 0; j < Config::kPack; ++j)
        from_float(scaled(state.value[h][i * Config::kPack + j], end.factor), pack.at[j]);
      if (e < p.head_dim) pack.store(p.out + at * p.head_dim + e);
    }
  }
}

// `splits` divides kTeams.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_query_kernel(AttendParams<typename Config::Element> p, int splits) {
  const int team = threadIdx.x / Config::kLanes, at_once = Config::kTeams / splits;
  const int64_t rows = query_rows(p, Config::kHeads), step = static_cast<int64_t>(gridDim.x) * at_once;
  ptx::griddepcontrol_wait();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * at_once; first < rows; first += step) {
    const QueryRow row = query_row(p, first + team / splits, Config::kHeads);
    QueryState<Config> state;
    attend_query_keys<Config>(p, row, team % splits, splits, state);
    if (splits > 1) merge_splits<Config::kThreads, Config::kLanes>(state, splits);
    const bool writes = team % splits == 0;
    write_query_row<Config>(p, writes ? row : QueryRow{0, 0, 0, 0, 0}, state);
  }
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, lanes per row, heads at once, vector loads). A launch takes the fewest lanes with
// D <= 8 lanes, and without vector loads 32. In 16-bit types the tensor cores take groups of heads.
#define RESONA_ATTEND_QUERY_INSTANCES(X) \
  X(float, 8, 1, true)                   \
  X(float, 16, 1, true)                  \
  X(float, 32, 1, true)                  \
  X(float, 16, 4, true)                  \
  X(float, 32, 4, true)                  \
  X(float, 32, 1, false)                 \
  X(Half, 8, 1, true)                    \
  X(Half, 16, 1, true)                   \
  X(Half, 32, 1, true)                   \
  X(Half, 32, 1, false)                  \
  X(BFloat16, 8, 1, true)                \
  X(BFloat16, 16, 1, true)               \
  X(BFloat16, 32, 1, true)               \
  X(BFloat16, 32, 1, false)

}  // namespace resona::cuda
