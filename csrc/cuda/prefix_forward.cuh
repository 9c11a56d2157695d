// Prefix linear attention in time linear in the tokens.
//
//   prefix_sums_kernel     only where sequences are cut: the sum of every piece of the prefix, and of the
//                          tokens but the last
//   prefix_scan_kernel     likewise: initial state + prefix + pieces before, in order: where a piece starts
//   prefix_sweep_kernel    a block per piece, or per sequence and head
//     state = initial state, tiles of the prefix absorbed            or what the scan left
//     for each tile of 64 tokens
//       | q~, k~, v~ -> shared memory as float32
//       | W = weights of its pairs j <= i                            tensor cores, 8 warps x (16 x 32)
//       | c = W v~ + psi(q) state                                    registers, 8 warps x (16 x half the
//       columns) | the column of ones, + 1e-12 = denominators -> shared memory | out = c / denominator; state
//       += psi(k)^T v~
//     last piece: the state in the operator's form
//
// The state of f = 16 and 64 values is 45 KiB and never leaves shared memory within a piece; a token costs
// one read of its own rows and one write. No [T, T] and no [T, features] matrix exists in memory. No block
// waits for another, every sum has one owner and one order: the same bits on every run. Not asynchronous: the
// loads of a tile are hidden by the other block of the multiprocessor only.
#pragma once

#include "cuda/prefix_state.cuh"
#include "cuda/ptx/griddepcontrol.cuh"

namespace resona::cuda {

struct PrefixForwardConfig : PrefixConfig {
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks = 65536 / (kThreads * kRegisterCap);
};

// k~ and v~ of a tile of the tokens or of the prefix.
template <class T>
__device__ __forceinline__ void load_keys(const PrefixParams<T>& p, const PrefixPlace& at,
                                          const PrefixShared& s, bool of_prefix, int64_t token, int64_t end) {
  const PrefixRows rows = prefix_rows_at(at, of_prefix ? at.prefix_begin : at.begin, token, end);
  load_features(p, rows, of_prefix ? p.prefix_key : p.key, s.key);
  load_values(p, at, rows, of_prefix ? p.prefix_value : p.value, true, s.value);
}

// state += the keys and values of a range.
template <class T>
__device__ __forceinline__ void absorb_range(const PrefixParams<T>& p, const PrefixPlace& at,
                                             const PrefixShared& s, bool of_prefix,
                                             const PrefixRange& range) {
#pragma unroll 1
  for (int64_t token = range.begin; token < range.end; token += kPrefixTokens) {
    load_keys(p, at, s, of_prefix, token, range.end);
    __syncthreads();  // keys and values are there, and so is the state
    absorb<kPrefixPieces<T>>(p.layout, s, s.key, s.value);
    __syncthreads();  // they may be replaced
  }
}

// What a piece of the tokens starts from.
template <class T>
__device__ __forceinline__ void start_state(const PrefixParams<T>& p, const PrefixPlace& at,
                                            const PrefixShared& s, int64_t piece) {
  if (p.is_cut()) {
    load_state(p.slot(at.lane, at.slice, piece), p.layout, s);
    return;
  }
  pack_state(p.initial, at, p.layout, p.scale, s);
  absorb_range(p, at, s, true, {0, at.prefix_count});
}

// c += W v~ + psi(q) state, of the warp's 16 rows and the columns of `half`.
template <class T, int kMost>
__device__ __forceinline__ void multiply_values(const PrefixLayout& l, const PrefixShared& s, int block,
                                                const PrefixHalf& half, float (&c)[kMost][4]) {
  clear_product(c);
  add_product<2, kPrefixPieces<T>>(
      c, half.tiles, 0, 16 * block + 16,
      PrefixMatrix{s.weight + 16 * block * kPrefixWeightStride, kPrefixWeightStride, 1},
      PrefixMatrix{s.value + 8 * half.first, l.column_stride, 1});
  read_state(l, s, s.query, block, half, c);
}

template <class T>
__device__ __forceinline__ void attend_tile(const PrefixParams<T>& p, const PrefixPlace& at,
                                            const PrefixShared& s, int64_t token, int64_t end) {
  const PrefixLayout& l = p.layout;
  const int warp = threadIdx.x / kWarpSize, block = warp % PrefixConfig::kBlocksOfRows;
  const PrefixHalf half = half_of(l, warp / PrefixConfig::kBlocksOfRows);
  const PrefixRows rows = prefix_rows_at(at, at.begin, token, end);
  float* denominators = s.scalars[0];
  load_features(p, rows, p.query, s.query);
  load_keys(p, at, s, false, token, end);
  __syncthreads();  // the tile is there
  weigh(p, s);
  __syncthreads();  // weights are written
  float c[PrefixConfig::kMostTiles][4];
  multiply_values<T>(l, s, block, half, c);
  for_product(c, half.tiles, [&](int row, int column, float x) {
    if (8 * half.first + column == l.slice_values) denominators[16 * block + row] = x + kPrefixEpsilon;
  });
  __syncthreads();  // denominators are written, the state is read
  for_product(c, half.tiles, [&](int row, int column, float x) {
    const int i = 16 * block + row, value = 8 * half.first + column;
    if (value >= at.values || i >= rows.count) return;
    T* to = p.out.at(rows.batch, rows.first + i, rows.head) + at.first_value + value;
    from_float(rows.is_real(i) ? x / denominators[i] : 0.f, *to);
  });
  absorb<kPrefixPieces<T>>(l, s, s.key, s.value);
  __syncthreads();  // the tile may be replaced
}

template <class T>
__global__ void __launch_bounds__(PrefixForwardConfig::kThreads, PrefixForwardConfig::kMinBlocks)
    prefix_sums_kernel(PrefixParams<T> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const PrefixShared s(p.layout, memory);
  const int64_t of_tokens = p.token_pieces - 1;
  const PrefixBlock own = prefix_block(p.layout.slices, of_tokens + p.prefix_pieces);
  write_pairs(p.layout, p.scale, s.pairs);
  clear_state(p.layout, s);
  ptx::griddepcontrol_wait();
  const PrefixPlace at = prefix_place(p, own);
  const bool of_prefix = own.piece >= of_tokens;
  const int64_t piece = of_prefix ? own.piece - of_tokens : own.piece;
  absorb_range(p, at, s, of_prefix, prefix_range(piece, p.segment, of_prefix ? at.prefix_count : at.count));
  store_state(p.layout, s, p.slot(at.lane, at.slice, of_prefix ? p.token_pieces + piece : piece));
  ptx::griddepcontrol_launch_dependents();
}

// From the sums of pieces to what each starts from. A thread takes one number of a state, piece by piece:
// from the first on, behind the prefix; or, for the gradients, from the last on.
template <class T>
__global__ void __launch_bounds__(PrefixForwardConfig::kThreads, PrefixForwardConfig::kMinBlocks)
    prefix_scan_kernel(PrefixParams<T> p, PrefixStates from, bool backward) {
  const PrefixLayout& l = p.layout;
  const int size = l.feature_rows * l.column_stride;
  ptx::griddepcontrol_wait();
  const int64_t blocks = (size + PrefixConfig::kThreads - 1) / PrefixConfig::kThreads;
  const PrefixBlock own = prefix_block(l.slices, blocks);
  const int i = static_cast<int>(own.piece) * PrefixConfig::kThreads + threadIdx.x;
  if (i >= size) return;
  const PrefixPlace at = prefix_place(p, own);
  const PrefixPair pair = pair_of(i / l.column_stride, l, p.scale);
  float running =
      packed_at(backward ? of_slice(from, at.slice) : from, at, l, p.scale, pair, i % l.column_stride);
  for (int64_t piece = 0; piece < p.prefix_pieces && !backward; ++piece)
    running += p.slot(at.lane, at.slice, p.token_pieces + piece)[i];
  for (int64_t step = 0; step < p.token_pieces; ++step) {
    float* slot = p.slot(at.lane, at.slice, backward ? p.token_pieces - 1 - step : step) + i;
    const bool is_end = step == p.token_pieces - 1;  // its sum is nobody's start
    const float sum = is_end ? 0 : *slot;
    *slot = running;
    running += sum;
  }
}

template <class T>
__global__ void __launch_bounds__(PrefixForwardConfig::kThreads, PrefixForwardConfig::kMinBlocks)
    prefix_sweep_kernel(PrefixParams<T> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const PrefixShared s(p.layout, memory);
  const PrefixBlock own = prefix_block(p.layout.slices, p.token_pieces);
  write_pairs(p.layout, p.scale, s.pairs);
  ptx::griddepcontrol_wait();
  const PrefixPlace at = prefix_place(p, own);
  const PrefixRange range = prefix_range(own.piece, p.segment, at.count);
  __syncthreads();  // pairs are written
  start_state(p, at, s, own.piece);
#pragma unroll 1
  for (int64_t token = range.begin; token < range.end; token += kPrefixTokens)
    attend_tile(p, at, s, token, range.end);
  __syncthreads();  // the state is complete, also where there was no tile
  if (own.piece == p.token_pieces - 1)
    unpack_state(p.layout, p.scale, at, s, p.initial, p.state, p.normalizer);
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
