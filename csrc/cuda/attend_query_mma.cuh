// Attention, query-stationary, on tensor cores: the kernel of attend_query.cuh for 16-bit rows of many keys
// or many heads.
//
//   a warp takes a query and up to 8 or 16 heads of a group
//     for each tile of 16 of its k S keys, chunk borders or not
//       indices of the tile after this one          one lane per key
//       key rows, value rows -> registers           16 bytes per lane and load, all before the first use
//       S^T = K Q^T     keys on M, heads on N: 8 heads fill a tile that 16 would need the other way round
//       softmax of the columns against the running peaks, between the 8 lanes of a column
//       P^T             scores as operand B: movmatrix
//       O^T += V^T P^T  keys are the depth now, elements of the head on M
//   `splits` warps of a block may share the keys of a row: partial results meet in shared memory
//   sink, division, out and lse
//
// Rows go from memory into the operands: no copy through shared memory, no barrier in the loop. That takes
// two permutations, which cost nothing because sums and rows may come in any order:
//   K Q^T   lane (g, t) loads elements 32 j + 8 t + {0 .. 7} of keys g, g + 8: pairs 0, 1 of them feed depth
//           step 2 j, pairs 2, 3 step 2 j + 1; Q likewise
//   V^T P^T lane (g, t) loads elements 64 i + 8 g + {0 .. 7} of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9; word w
//           of two keys becomes rows g and g + 8 of tile 4 i + w by two byte permutations
// So a lane ends with 8 neighbouring elements of a head: one 16-byte store.
//
// Bytes: 4 D + 4 D k S / min(G, kHeads) per row of the output. In flight: 6 KB per warp at D = 128, by
// estimate about twice what hides the latency of the L2 with 12 warps per SM. Tensor cores idle even at one
// head: some 32 cycles of an SM for 16 keys at D = 128, against 340 to bring them (8 KB, 24 bytes per cycle).
#pragma once

#include "cuda/attend_query_row.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/movmatrix.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

// Wants AttendParams::vector and D <= kMostDim.
template <class T, int kMostDim, int kTilesOfHeads>
struct AttendQueryMmaConfig {
  using Element = T;
  static constexpr int kDim = kMostDim;
  static constexpr int kHeadTiles = kTilesOfHeads;
  static constexpr int kHeads = 8 * kHeadTiles;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kKeys = 16;
  static constexpr int kSlice = kDim < 128 ? kDim : 128;  // elements of a key row that are loaded at once
  static constexpr int kRows = 2 * kHeadTiles, kValues = kDim / 8;  // of the output, per lane
  static constexpr int kSplitBytes = (kThreads - kWarpSize) * kRows * (kValues + 2) * 4;  // if splits > 1
  static constexpr int kRegisterCap = 255;
  static constexpr int kMinBlocks = kDim * kHeadTiles <= 128 ? 3 : 2;
};

// Operand B of S^T = K Q^T. Each lane keeps its own share here: 12 warps per SM leave no registers for it.
template <class Config>
struct QueryMmaStorage {
  uint4 query[Config::kHeadTiles][Config::kDim / 32][Config::kThreads];
  static_assert(sizeof(query) + Config::kSplitBytes <= 48 * 1024, "no launch has to ask for more");
};

__device__ __forceinline__ uint4 load_16_bytes(const void* row, bool exists) {
  return exists ? ptx::ld_global_v4(row) : make_uint4(0, 0, 0, 0);
}

// The operand A of S^T = K Q^T: a slice of 16 keys.
template <class Config>
struct QueryKeyTile {
  uint4 at[Config::kSlice / 32][2];

  template <class T>
  __device__ __forceinline__ void load(const AttendParams<T>& p, const QueryRow& row, const QueryKey& key,
                                       int slice) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = __shfl_sync(kAllLanes, key.token, lane / 4 + 8 * half);
      const T* from = p.key.at(row.batch, token, row.kv_head);
#pragma unroll
      for (int j = 0; j < Config::kSlice / 32; ++j) {
        const int e = slice * Config::kSlice + 32 * j + lane % 4 * 8;
        at[j][half] = load_16_bytes(from + e, token >= 0 && e < p.head_dim);
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void multiply(float (&scores)[4], const uint4 (*query)[Config::kThreads],
                                           T) const {
#pragma unroll
    for (int j = 0; j < Config::kSlice / 32; ++j) {
      const uint4 low = at[j][0], high = at[j][1], q = query[j][threadIdx.x];
      multiply_16(T(), scores, {low.x, high.x, low.y, high.y}, q.x, q.y);
      multiply_16(T(), scores, {low.z, high.z, low.w, high.w}, q.z, q.w);
    }
  }
};

// The operand A of O^T = V^T P^T: elements 64 i .. 64 i + 63 of 16 value rows.
struct QueryValueTile {
  uint4 at[4];

  template <class T>
  __device__ __forceinline__ void load(const AttendParams<T>& p, const QueryRow& row, const QueryKey& key,
                                       int i) {
    const int lane = threadIdx.x % kWarpSize, e = 64 * i + lane / 4 * 8;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int token = __shfl_sync(kAllLanes, key.token, lane % 4 * 2 + k % 2 + k / 2 * 8);
      at[k] = load_16_bytes(p.value.at(row.batch, token, row.kv_head) + e, token >= 0 && e < p.head_dim);
    }
  }

  // Of row tile 4 i + w.
  __device__ __forceinline__ void operand(int w, uint32_t (&a)[4]) const {
    const auto word = [w](const uint4& x) { return w == 0 ? x.x : w == 1 ? x.y : w == 2 ? x.z : x.w; };
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t even = word(at[2 * pair]), odd = word(at[2 * pair + 1]);
      a[2 * pair] = (even & 0xffffu) | odd << 16;
      a[2 * pair + 1] = even >> 16 | (odd & 0xffff0000u);
    }
  }
};

template <class Config>
struct QueryMmaState {
  float peak[Config::kHeadTiles][2], total[Config::kHeadTiles][2];  // of heads 2 t, 2 t + 1; shares of totals
  float out[Config::kHeadTiles][Config::kDim / 16][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < Config::kHeadTiles; ++h) {
      peak[h][0] = peak[h][1] = -kInfinity, total[h][0] = total[h][1] = 0;
#pragma unroll
      for (int m = 0; m < Config::kDim / 16; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[h][m][i] = 0;
    }
  }
};

// Products of 16 keys with 8 heads to weights, packed as operand B; the lane's own key is number lane % 16.
template <class Config, class T>
__device__ __forceinline__ void softmax_columns(const AttendParams<T>& p, const QueryKey& key, int h,
                                                float (&scores)[4], QueryMmaState<Config>& state,
                                                uint32_t (&weights)[2]) {
  const int g = threadIdx.x % kWarpSize / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = __shfl_sync(kAllLanes, key.token, g + 8 * half);
    const float bias = __shfl_sync(kAllLanes, key.bias, g + 8 * half);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float& x = scores[2 * half + c];
      x = token < 0 ? -kInfinity : x * p.scale + bias;
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float peak = fmaxf(scores[c], scores[2 + c]);
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2)
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, distance));
    peak = fmaxf(peak, state.peak[h][c]);
    const float reference = safe_peak(peak), decay = exp_of(state.peak[h][c] - reference);
    scores[c] = exp_of(scores[c] - reference), scores[2 + c] = exp_of(scores[2 + c] - reference);
    state.peak[h][c] = peak;
    state.total[h][c] = state.total[h][c] * decay + (scores[c] + scores[2 + c]);
#pragma unroll
    for (int m = 0; m < Config::kDim / 16; ++m) state.out[h][m][c] *= decay, state.out[h][m][2 + c] *= decay;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    weights[half] = ptx::movmatrix_trans(pack_16(T(), scores[2 * half], scores[2 * half + 1]));
}

template <class Config, class T>
__device__ __forceinline__ void attend_query_mma_tile(const AttendParams<T>& p, const QueryRow& row,
                                                      const QueryKey& key,
                                                      const QueryMmaStorage<Config>& storage,
                                                      QueryMmaState<Config>& state) {
  constexpr int kDim = Config::kDim, kSlice = Config::kSlice;
  QueryKeyTile<Config> keys;
  QueryValueTile values[2];
  keys.load(p, row, key, 0);
  values[0].load(p, row, key, 0);
  float scores[Config::kHeadTiles][4] = {};
#pragma unroll
  for (int slice = 0; slice < kDim / kSlice; ++slice) {
    if (slice > 0) keys.load(p, row, key, slice);
#pragma unroll
    for (int h = 0; h < Config::kHeadTiles; ++h)
      keys.multiply(scores[h], storage.query[h] + slice * kSlice / 32, T());
  }
  if constexpr (kDim > 64) values[1].load(p, row, key, 1);
  uint32_t weights[Config::kHeadTiles][2];
#pragma unroll
  for (int h = 0; h < Config::kHeadTiles; ++h)
    softmax_columns<Config>(p, key, h, scores[h], state, weights[h]);
#pragma unroll
  for (int i = 0; i < kDim / 64; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t a[4];
      values[i % 2].operand(w, a);
#pragma unroll
      for (int h = 0; h < Config::kHeadTiles; ++h)
        multiply_16(T(), state.out[h][4 * i + w], a, weights[h][0], weights[h][1]);
    }
    if (i + 2 < kDim / 64) values[i % 2].load(p, row, key, i + 2);
  }
}

// The keys of a row, tile by tile: list() returns the lane's own. It is called here and not before, or rows
// of 256 elements would spill.
template <class Config, class T, class List>
__device__ __forceinline__ void attend_listed_keys_mma(const AttendParams<T>& p, const QueryRow& row,
                                                       const List& list, QueryMmaStorage<Config>& storage,
                                                       QueryMmaState<Config>& state) {
  const int lane = threadIdx.x % kWarpSize;
  state.clear();
  QueryKeys keys = list();
  if (keys.eligible == 0) return;
#pragma unroll
  for (int h = 0; h < Config::kHeadTiles; ++h) {
    const int head = 8 * h + lane / 4;
    const T* from = p.query.at(row.batch, row.query, row.head + head);
#pragma unroll
    for (int j = 0; j < Config::kDim / 32; ++j) {
      const int e = 32 * j + lane % 4 * 8;
      storage.query[h][j][threadIdx.x] = load_16_bytes(from + e, head < row.heads && e < p.head_dim);
    }
  }
  QueryKey next = keys.next();
  for (bool more = true; more;) {
    const QueryKey key = next;
    more = __any_sync(kAllLanes, keys.more());
    next = keys.next();  // on its way while the tile is worked on
    __syncwarp();        // for the compiler: Q is read again for every tile
    if (__any_sync(kAllLanes, key.token >= 0)) attend_query_mma_tile<Config>(p, row, key, storage, state);
  }
}

// Every `splits`-th tile of a row, beginning with number `split`.
template <class Config, class T>
__device__ __forceinline__ void attend_query_mma_keys(const AttendParams<T>& p, const QueryRow& row,
                                                      int split, int splits, QueryMmaStorage<Config>& storage,
                                                      QueryMmaState<Config>& state) {
  const auto list = [&] {
    const int lane = threadIdx.x % kWarpSize, step = splits * Config::kKeys;
    return query_keys(p, row, split * Config::kKeys + lane % Config::kKeys, step);
  };
  attend_listed_keys_mma<Config>(p, row, list, storage, state);
}

// Head by head: the lane's elements 8 i .. 8 i + 7 of a head are 64 i + 8 g .. 64 i + 8 g + 7 of its row.
template <class Config>
__device__ __forceinline__ QueryPartial<Config::kRows, Config::kValues> by_heads(
    const QueryMmaState<Config>& state) {
  QueryPartial<Config::kRows, Config::kValues> partial;
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r) {
    partial.peak[r] = state.peak[r / 2][r % 2], partial.total[r] = state.total[r / 2][r % 2];
#pragma unroll
    for (int i = 0; i < Config::kValues; ++i)
      partial.value[r][i] = state.out[r / 2][i / 2][r % 2 + i % 2 * 2];
  }
  return partial;
}

template <class Config, class T>
__device__ __forceinline__ void write_query_mma_row(
    const AttendParams<T>& p, const QueryRow& row,
    const QueryPartial<Config::kRows, Config::kValues>& partial) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r) {
    float total = partial.total[r];
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2)
      total += __shfl_xor_sync(kAllLanes, total, distance);
    const int head = r / 2 * 8 + lane % 4 * 2 + r % 2;
    if (head >= row.heads) continue;
    const RowEnd end = end_of_query(p, row.head + head, partial.peak[r], total);
    const int64_t at = (row.batch * p.queries + row.query) * p.heads + row.head + head;
    if (lane < 4) p.lse[at] = end.lse;
#pragma unroll
    for (int i = 0; i < Config::kValues / 8; ++i) {
      const int e = 64 * i + lane / 4 * 8;
      Pack<T, true> pack;
#pragma unroll
      for (int j = 0; j < 8; ++j) from_float(scaled(partial.value[r][8 * i + j], end.factor), pack.at[j]);
      if (e < p.head_dim) pack.store(p.out + at * p.head_dim + e);
    }
  }
}

// `splits` divides kWarps.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_query_mma_kernel(AttendParams<typename Config::Element> p, int splits) {
  using Storage = QueryMmaStorage<Config>;
  RESONA_SHARED(Storage, storage);
  const int warp = threadIdx.x / kWarpSize, at_once = Config::kWarps / splits;
  const int64_t rows = query_rows(p, Config::kHeads), step = static_cast<int64_t>(gridDim.x) * at_once;
  ptx::griddepcontrol_wait();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * at_once; first < rows; first += step) {
    const QueryRow row = query_row(p, first + warp / splits, Config::kHeads);
    QueryMmaState<Config> state;
    attend_query_mma_keys<Config>(p, row, warp % splits, splits, storage, state);
    auto partial = by_heads<Config>(state);
    if (splits > 1) merge_splits<Config::kThreads, kWarpSize>(partial, splits);
    if (warp % splits == 0) write_query_mma_row<Config>(p, row, partial);
  }
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, most elements of a row, tiles of 8 heads). A launch takes the narrowest, and two
// tiles for groups of more than 8 heads where there are two.
#define RESONA_ATTEND_QUERY_MMA_INSTANCES(X) \
  X(Half, 64, 1)                             \
  X(Half, 128, 1)                            \
  X(Half, 128, 2)                            \
  X(Half, 256, 1)                            \
  X(BFloat16, 64, 1)                         \
  X(BFloat16, 128, 1)                        \
  X(BFloat16, 128, 2)                        \
  X(BFloat16, 256, 1)

}  // namespace resona::cuda
