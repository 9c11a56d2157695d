// Chunk pooling: the unit-norm sum of each whole chunk, in the canonical arithmetic of common/canonical.h.
//
//   a warp takes four rows of the output (chunk x retrieval head) at a time
//     for each slice of E                                              one, unless E > 256
//       groups of kLanes lanes sum the tokens of one row each   fp32, ascending, 16-byte loads
//       sums -> shared memory
//       8 lanes per row add the squares                                fp64, canonical order
//     norm = sqrt, once per row
//     for each slice: (sums again, if there are several) divide, round, store
//
// Bytes: the context once (twice, mostly from L2, if E > 256) and the chunks once. At S tokens per chunk the
// fp64 work is (1 FMA + 1 division) / S per element read, below the memory time everywhere but at S = 1 on
// devices with few fp64 units. No block waits for another; every element has one writer.
//
// Chunk rows beyond the last sequence of a packed batch are written as zeros.
#pragma once

#include <cmath>

#include "common/canonical.h"
#include "cuda/canonical_warp.cuh"
#include "cuda/device.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/sequences.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

template <class T>
struct PoolParams {
  const T* context;                                 // [B, L, R, E], last dimension contiguous
  int64_t batch_stride, token_stride, head_stride;  // of context, in elements
  T* chunks;                                        // [B, C, R, E], contiguous
  int64_t batch, length, heads, dim;                // B, L, R, E
  int64_t chunk_size, chunks_per_batch;             // S, C = L / S
  PackedSequences packed;                           // B == 1 if there are any
  uint32_t* cleared;                                // [cleared_count]: counters of a kernel behind this one
  int64_t cleared_count;
};

// Sixteen-byte loads want rows, strides and E to be multiples of 16 bytes, and both tensors aligned so.
template <class T, int kLanesPerRow, bool kVectorLoads>
struct PoolConfig {
  using Element = T;
  static constexpr int kLanes = kLanesPerRow;
  static constexpr bool kVector = kVectorLoads;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kRows = kWarpSize / canonical::kLanes;  // of a warp
  static constexpr int kGroups = kWarpSize / kLanes;           // rows that are summed at once
  static constexpr int kPerLane = 8;
  static constexpr int kSlice = kLanes * kPerLane;  // elements of a row
  static constexpr int kPacks = kPerLane / Pack<T, kVector>::kSize;
  static constexpr int kUnroll = kPacks < 4 ? 4 / kPacks : 1;  // tokens in flight per lane: 64 bytes
  // Rows begin 8 banks apart, so 8 lanes on each of 4 rows read without conflict.
  static constexpr int kRowStride = kSlice + 8;
  static constexpr int kRegisterCap = 96;
  static constexpr int kMinBlocks = 65536 / (kThreads * kRegisterCap);
  static_assert(kRows % kGroups == 0 && kSlice % canonical::kLanes == 0, "a slice is whole canonical steps");
};

template <class Config>
struct PoolStorage {
  float sums[Config::kWarps][Config::kRows][Config::kRowStride];
};

// Where the tokens of an output row begin in the context, or -1 if there are none.
template <class T>
__device__ __forceinline__ int64_t pool_source(const PoolParams<T>& p, int64_t row) {
  if (row >= p.batch * p.chunks_per_batch * p.heads) return -1;
  const int64_t head = row % p.heads, chunk_row = row / p.heads;
  int64_t batch = 0, token;
  if (p.packed.cu_seqlens) {
    token = first_token_of_chunk(p.packed, chunk_row, p.length, p.chunk_size);
    if (token < 0) return -1;
  } else {
    batch = chunk_row / p.chunks_per_batch;
    token = chunk_row % p.chunks_per_batch * p.chunk_size;
  }
  return batch * p.batch_stride + token * p.token_stride + head * p.head_stride;
}

// The elements of a slice that a lane owns, pack by pack: f(first element, index of the pack). Packs of the
// lanes of a group lie side by side. `count` elements of the slice exist.
template <class Config, class F>
__device__ __forceinline__ void for_packs(int count, const F& f) {
  constexpr int kPack = Pack<typename Config::Element, Config::kVector>::kSize;
  const int first = threadIdx.x % Config::kLanes * kPack;
#pragma unroll
  for (int i = 0; i < Config::kPacks; ++i) {
    const int e = i * Config::kLanes * kPack + first;
    if (e < count) f(e, i);
  }
}

// Sums a slice of one row over the tokens of its chunk, in ascending order.
template <class Config, class T>
__device__ __forceinline__ void sum_tokens(const PoolParams<T>& p, const T* token, int count, float* sums) {
  using Packs = Pack<T, Config::kVector>;
  float sum[Config::kPerLane] = {};
  for (int64_t left = p.chunk_size; left > 0; left -= Config::kUnroll) {
    Packs packs[Config::kUnroll][Config::kPacks];
#pragma unroll
    for (int u = 0; u < Config::kUnroll; ++u) {
      if (u < left) for_packs<Config>(count, [&](int e, int i) { packs[u][i].load(token + e); });
      token += p.token_stride;
    }
#pragma unroll
    for (int u = 0; u < Config::kUnroll; ++u) {
      if (u >= left) continue;
      for_packs<Config>(count, [&](int, int i) {
#pragma unroll
        for (int j = 0; j < Packs::kSize; ++j) sum[i * Packs::kSize + j] += to_float(packs[u][i].at[j]);
      });
    }
  }
  for_packs<Config>(count, [&](int e, int i) {
#pragma unroll
    for (int j = 0; j < Packs::kSize; ++j) sums[e + j] = sum[i * Packs::kSize + j];
  });
}

// One slice of the warp's four rows; `source` is that of row lane / 8.
template <class Config, class T>
__device__ __forceinline__ void sum_rows(const PoolParams<T>& p, int64_t source, int64_t slice, int count,
                                         float (*sums)[Config::kRowStride]) {
  const int group = threadIdx.x % kWarpSize / Config::kLanes;
#pragma unroll 1
  for (int i = 0; i < Config::kRows; i += Config::kGroups) {
    const int64_t from = __shfl_sync(kAllLanes, source, (i + group) * canonical::kLanes);
    float* to = sums[i + group];
    if (from >= 0)
      sum_tokens<Config>(p, p.context + from + slice, count, to);
    else
      for_packs<Config>(count, [&](int e, int) {
        for (int j = 0; j < Pack<T, Config::kVector>::kSize; ++j) to[e + j] = 0;
      });
  }
}

template <class Config, class T>
__device__ __forceinline__ void write_rows(const PoolParams<T>& p, double norm, int64_t first_row,
                                           int64_t slice, int count, float (*sums)[Config::kRowStride]) {
  using Packs = Pack<T, Config::kVector>;
  const int group = threadIdx.x % kWarpSize / Config::kLanes;
#pragma unroll 1
  for (int i = 0; i < Config::kRows; i += Config::kGroups) {
    const double row_norm = __shfl_sync(kAllLanes, norm, (i + group) * canonical::kLanes);
    const int64_t row = first_row + i + group;
    if (row >= p.batch * p.chunks_per_batch * p.heads) continue;
    T* to = p.chunks + row * p.dim + slice;
    for_packs<Config>(count, [&](int e, int) {
      float* sum = sums[i + group] + e;
      // Divided in place and one by one: side by side, the divisions of a pack would spill registers.
#pragma unroll 1
      for (int j = 0; j < Packs::kSize; ++j) sum[j] = canonical::unit(sum[j], row_norm);
      Packs pack;
#pragma unroll
      for (int j = 0; j < Packs::kSize; ++j) from_float(sum[j], pack.at[j]);
      pack.store(to + e);
    });
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    pool_kernel(PoolParams<typename Config::Element> p) {
  using Storage = PoolStorage<Config>;
  RESONA_SHARED(Storage, storage);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int own_row = lane / canonical::kLanes;
  float (*sums)[Config::kRowStride] = storage.sums[warp];
  const int64_t rows = p.batch * p.chunks_per_batch * p.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Config::kWarps * Config::kRows;
  ptx::griddepcontrol_wait();
  if (blockIdx.x == 0)
    for (int64_t i = threadIdx.x; i < p.cleared_count; i += Config::kThreads) p.cleared[i] = 0;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * Config::kWarps + warp) * Config::kRows; row < rows;
       row += step) {
    const int64_t source = pool_source(p, row + own_row);
    double norm = 0;
    for (int pass = 0; pass < 2; ++pass) {  // norms, then rows
      double partial = 0;
      for (int64_t slice = 0; slice < p.dim; slice += Config::kSlice) {
        const int64_t left = p.dim - slice;
        const int count = left < Config::kSlice ? static_cast<int>(left) : Config::kSlice;
        if (pass == 0 || p.dim > Config::kSlice) sum_rows<Config>(p, source, slice, count, sums);
        __syncwarp();
        if (pass == 0)
          partial = add_squares(partial, sums[own_row], lane % canonical::kLanes, count);
        else
          write_rows<Config>(p, norm, row, slice, count, sums);
        __syncwarp();  // read before the next slice or row replaces it
      }
      if (pass == 0) norm = std::sqrt(fold_lanes(partial));
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, lanes per row, vector loads). A launch takes the first with E <= 8 lanes, or 32.
#define RESONA_POOL_INSTANCES(X) \
  X(float, 8, true)              \
  X(float, 16, true)             \
  X(float, 32, true)             \
  X(float, 32, false)            \
  X(Half, 8, true)               \
  X(Half, 16, true)              \
  X(Half, 32, true)              \
  X(Half, 32, false)             \
  X(BFloat16, 8, true)           \
  X(BFloat16, 16, true)          \
  X(BFloat16, 32, true)          \
  X(BFloat16, 32, false)

}  // namespace resona::cuda
