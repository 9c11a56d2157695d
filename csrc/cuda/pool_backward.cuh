// The gradient of chunk pooling. With c = sum / |sum| and g the gradient of c,
//
//   d token = (g - <g, c> c) / |sum|      for every token of the chunk; zero if |sum| = 0
//
//   a warp takes four rows (chunk x retrieval head) at a time, as pool_kernel does
//     sums of the tokens -> shared memory, norm                      the forward pass again: nothing is saved
//     g -> shared memory; 8 lanes per row: c in place, <g, c>        fp64, canonical order
//     groups of kLanes lanes: the gradient of one row, stored once per token
//   tokens in no chunk (the ragged tail of a sequence): a lane finds 32 of them, the warp writes zeros
//
// Rows of E > 256 come in slices, and each of the three steps sums the tokens again.
//
// Bytes: the context once (three times, mostly from L2, if E > 256), its gradient once, the chunks' gradient
// once. fp64 work is (2 FMA + 2 divisions) / S per element written. No block waits for another; where
// cu_seqlens is right, every element of the gradient has one writer, so the output needs no clearing.
#pragma once

#include <cmath>

#include "cuda/pool.cuh"

namespace resona::cuda {

template <class T>
struct PoolBackwardParams {
  PoolParams<T> forward;    // `chunks` is not used
  const T* chunk_gradient;  // [B, C, R, E], contiguous
  T* context_gradient;      // [B, L, R, E], contiguous
};

// Sixteen-byte loads want all three tensors aligned so, and E and the strides to be multiples of 16 bytes.
template <class T, int kLanesPerRow, bool kVectorLoads>
struct PoolBackwardConfig : PoolConfig<T, kLanesPerRow, kVectorLoads> {
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks =
      65536 / (PoolConfig<T, kLanesPerRow, kVectorLoads>::kThreads * kRegisterCap);
};

template <class Config>
struct PoolBackwardStorage {
  float sums[Config::kWarps][Config::kRows][Config::kRowStride];
  float gradients[Config::kWarps][Config::kRows][Config::kRowStride];
};

// Where the tokens of a row begin in the contiguous gradient, or -1 if there are none.
template <class T>
__device__ __forceinline__ int64_t pool_target(PoolParams<T> p, int64_t row) {
  p.head_stride = p.dim;
  p.token_stride = p.heads * p.dim;
  p.batch_stride = p.length * p.token_stride;
  return pool_source(p, row);
}

template <class Config, class T>
__device__ __forceinline__ void load_gradients(const PoolBackwardParams<T>& p, int64_t first_row,
                                               int64_t slice, int count,
                                               float (*gradients)[Config::kRowStride]) {
  using Packs = Pack<T, Config::kVector>;
  const int64_t rows = p.forward.batch * p.forward.chunks_per_batch * p.forward.heads;
  const int group = threadIdx.x % kWarpSize / Config::kLanes;
  for (int i = group; i < Config::kRows; i += Config::kGroups) {
    if (first_row + i >= rows) continue;
    const T* from = p.chunk_gradient + (first_row + i) * p.forward.dim + slice;
    for_packs<Config>(count, [&](int e, int) {
      Packs pack;
      pack.load(from + e);
#pragma unroll
      for (int j = 0; j < Packs::kSize; ++j) gradients[i][e + j] = to_float(pack.at[j]);
    });
  }
}

// Turns lane p's share of the sums into the chunk, and adds its products with the gradient.
__device__ __forceinline__ double add_along(double partial, float* sums, const float* gradients, double norm,
                                            int p, int count) {
#pragma unroll 1
  for (int e = p; e < count; e += canonical::kLanes) {
    sums[e] = canonical::unit(sums[e], norm);
    partial += static_cast<double>(gradients[e]) * static_cast<double>(sums[e]);
  }
  return partial;
}

// `norm` = |sum| and `along` = <g, c> are those of row lane / 8; `sums` holds the chunks, or their sums again
// (`sliced`).
template <class Config, class T>
__device__ __forceinline__ void write_gradients(const PoolBackwardParams<T>& p, int64_t first_row,
                                                double own_norm, double own_along, int64_t slice, int count,
                                                bool sliced, float (*sums)[Config::kRowStride],
                                                float (*gradients)[Config::kRowStride]) {
  using Packs = Pack<T, Config::kVector>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t own_target = pool_target(p.forward, first_row + lane / canonical::kLanes);
#pragma unroll 1
  for (int first = 0; first < Config::kRows; first += Config::kGroups) {
    const int i = first + lane / Config::kLanes;
    const int from = i * canonical::kLanes;
    const double norm = __shfl_sync(kAllLanes, own_norm, from),
                 along = __shfl_sync(kAllLanes, own_along, from);
    const int64_t target = __shfl_sync(kAllLanes, own_target, from);
    if (target < 0) continue;
    for_packs<Config>(count, [&](int e, int) {
      Packs pack;
      // One by one, in shared memory: side by side, the divisions of a pack would spill registers.
#pragma unroll 1
      for (int j = e; j < e + Packs::kSize; ++j) {
        const float chunk = sliced ? canonical::unit(sums[i][j], norm) : sums[i][j];
        sums[i][j] = norm == 0 ? 0.f : static_cast<float>((gradients[i][j] - along * chunk) / norm);
      }
#pragma unroll
      for (int j = 0; j < Packs::kSize; ++j) from_float(sums[i][e + j], pack.at[j]);
      T* to = p.context_gradient + target + slice + e;
      for (int64_t s = 0; s < p.forward.chunk_size; ++s, to += p.forward.heads * p.forward.dim)
        pack.store(to);
    });
  }
}

// ---- tokens in no chunk

// They are looked for among all tokens of a packed batch, else they stand at the end of each batch entry.
template <class T>
__device__ __forceinline__ int64_t rest_candidates(const PoolParams<T>& p) {
  return p.packed.cu_seqlens ? p.length : p.batch * (p.length - p.chunks_per_batch * p.chunk_size);
}

// The token (batch L + token) of a candidate, or -1 if it is in a chunk.
template <class T>
__device__ __forceinline__ int64_t rest_token(const PoolParams<T>& p, int64_t candidate) {
  if (!p.packed.cu_seqlens) {
    const int64_t whole = p.chunks_per_batch * p.chunk_size, rest = p.length - whole;
    return candidate / rest * p.length + whole + candidate % rest;
  }
  const QueryPlace place =
      place_of_query(p.packed, candidate, p.length, p.length, p.chunk_size, p.chunks_per_batch);
  if (candidate < place.token_begin) return candidate;
  // The chunk row that would hold the token, were its sequence to have it; else the row is another's.
  const int64_t row = place.chunk_begin + (candidate - place.token_begin) / p.chunk_size;
  const int64_t first = first_token_of_chunk(p.packed, row, p.length, p.chunk_size);
  return first >= 0 && first <= candidate && candidate - first < p.chunk_size ? -1 : candidate;
}

template <class Config, class T>
__device__ __forceinline__ void clear_rest(const PoolBackwardParams<T>& p, int64_t warp, int64_t warps) {
  using Packs = Pack<T, Config::kVector>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t count = rest_candidates(p.forward), width = p.forward.heads * p.forward.dim;
  Packs zeros;
  zeros.clear();
  for (int64_t first = warp * kWarpSize; first < count; first += warps * kWarpSize) {
    const int64_t token = first + lane < count ? rest_token(p.forward, first + lane) : -1;
    for (unsigned left = __ballot_sync(kAllLanes, token >= 0); left != 0; left &= left - 1) {
      T* to = p.context_gradient + __shfl_sync(kAllLanes, token, __ffs(left) - 1) * width;
      for (int64_t e = lane * Packs::kSize; e < width; e += kWarpSize * Packs::kSize) zeros.store(to + e);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    pool_backward_kernel(PoolBackwardParams<typename Config::Element> p) {
  using Storage = PoolBackwardStorage<Config>;
  RESONA_SHARED(Storage, storage);
  const int lane = threadIdx.x % kWarpSize, warp_of_block = threadIdx.x / kWarpSize;
  const int own_row = lane / canonical::kLanes, part = lane % canonical::kLanes;
  float (*sums)[Config::kRowStride] = storage.sums[warp_of_block];
  float (*gradients)[Config::kRowStride] = storage.gradients[warp_of_block];
  const int64_t rows = p.forward.batch * p.forward.chunks_per_batch * p.forward.heads, dim = p.forward.dim;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * Config::kWarps + warp_of_block;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * Config::kWarps;
  const bool sliced = dim > Config::kSlice;
  enum Pass { kNorm, kAlong, kWrite, kPasses };
  ptx::griddepcontrol_wait();
  for (int64_t row = warp * Config::kRows; row < rows; row += warps * Config::kRows) {
    const int64_t source = pool_source(p.forward, row + own_row);
    double norm = 0, along = 0;
    for (int pass = kNorm; pass < kPasses; ++pass) {
      double partial = 0;
      for (int64_t slice = 0; slice < dim; slice += Config::kSlice) {
        const int count = dim - slice < Config::kSlice ? static_cast<int>(dim - slice) : Config::kSlice;
        if (pass == kNorm || sliced) sum_rows<Config>(p.forward, source, slice, count, sums);
        if (pass == kNorm ? !sliced : sliced) load_gradients<Config>(p, row, slice, count, gradients);
        __syncwarp();
        if (pass == kNorm)
          partial = add_squares(partial, sums[own_row], part, count);
        else if (pass == kWrite)
          write_gradients<Config>(p, row, norm, along, slice, count, sliced, sums, gradients);
        else if (source >= 0)
          partial = add_along(partial, sums[own_row], gradients[own_row], norm, part, count);
        __syncwarp();  // written before the next pass reads, read before the next slice or row replaces it
      }
      if (pass == kNorm) norm = std::sqrt(fold_lanes(partial));
      if (pass == kAlong) along = fold_lanes(partial);
    }
  }
  clear_rest<Config>(p, warp, warps);
  ptx::griddepcontrol_launch_dependents();
}

// Every instance, chosen as those of pool_kernel are.
#define RESONA_POOL_BACKWARD_INSTANCES(X) RESONA_POOL_INSTANCES(X)

}  // namespace resona::cuda
