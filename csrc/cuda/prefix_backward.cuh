// The gradients of prefix linear attention. The forward pass saves its output only: states and weights are
// made again.
//
//   y = num / den;   g~ = [dy / den, -<dy, y> / den], the gradients of num and den of one token
//
//   sums, scan                              where sequences are cut: as forward
//   prefix_query_gradient_kernel            tiles in order, carrying  S = sum of psi(k) v~^T
//     | den = W 1 + psi(q) z;  g~;  1 / den and d den -> memory
//     | D = scale (1 + s) <g~, v~> of the pairs j <= i
//     | d q = D k + through(q, g~ S^T);  S += psi(k)^T v~
//   prefix_gradient_sums_kernel, scan       where sequences are cut: sums of psi(q) g~^T, from the end
//   prefix_key_gradient_kernel              tiles from the last, carrying  R = sum of psi(q) g~^T
//     | d v = W^T g + psi(k) R;  d k = D^T q + through(k, v~ R^T);  R += psi(q)^T g~
//     | then the prefix, and the initial state, meet the R of all tokens
//   prefix_rows_gradient_kernel             where sequences are cut: the prefix, piece by piece
//   prefix_gather_kernel                    where value columns are sliced: d q and d k, slice after slice
//
// Every gradient has one owner and every sum one order: the same bits on every run, without atomics.
// `through` is told of in prefix_backward_tile.cuh.
#pragma once

#include "cuda/prefix_backward_tile.cuh"

namespace resona::cuda {

struct PrefixBackwardConfig : PrefixConfig {
  static constexpr int kRegisterCap = 168;
  static constexpr int kMinBlocks = 1;  // shared memory has no room for two at f = 16 and 64 values
};

template <class T>
__device__ __forceinline__ void query_gradient_tile(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                                    const PrefixShared& s, int64_t token, int64_t end) {
  const PrefixParams<T>& f = p.forward;
  const PrefixRows rows = prefix_rows_at(at, at.begin, token, end);
  load_features(f, rows, f.query, s.query);
  load_keys(f, at, s, false, token, end);
  load_gradients(p, at, s, rows);
  dot_gradients(p, rows, s.scalars[0]);
  __syncthreads();  // the tile is there
  weigh(f, s);
  __syncthreads();  // weights are written
  find_denominators(p, at, s, rows);
  __syncthreads();  // denominators are written
  scale_gradients(f.layout, at, s);
  __syncthreads();  // g~ is written
  score_gradients(p, s, false);
  __syncthreads();  // D is written
  linear_gradients<T, PrefixPairs::kEarlierKeys, 2>(f, s, s.gradient);
  __syncthreads();  // gradients of rows are begun
  quadratic_gradients<2>(f.layout, f.scale, s, s.query, s.gradient);
  __syncthreads();  // gradients of rows are written, the state is read
  store_row_gradients(p, at, s, rows, rows.count, p.query_gradient, p.query_partials, f.tokens);
  absorb<kPrefixPieces<T>>(f.layout, s, s.key, s.value);
  __syncthreads();  // the tile may be replaced
}

template <class T>
__device__ __forceinline__ void key_gradient_tile(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                                  const PrefixShared& s, int64_t token, int64_t end) {
  const PrefixParams<T>& f = p.forward;
  const PrefixRows rows = prefix_rows_at(at, at.begin, token, end);
  load_features(f, rows, f.query, s.query);
  load_keys(f, at, s, false, token, end);
  load_gradients(p, at, s, rows);
  load_denominators(p, at, s, rows);
  __syncthreads();  // queries and keys are there
  scale_gradients(f.layout, at, s);
  __syncthreads();  // g~ is scaled
  score_gradients(p, s, true);
  __syncthreads();  // W and D are written
  write_value_gradients<T, true>(f, at, s, rows, rows.count, p.value_gradient);
  linear_gradients<T, PrefixPairs::kLaterQueries, kPrefixPieces<T>>(f, s, s.value);
  __syncthreads();  // gradients of keys are begun
  quadratic_gradients<kPrefixPieces<T>>(f.layout, f.scale, s, s.key, s.value);
  __syncthreads();  // gradients of keys are written, the state is read
  store_row_gradients(p, at, s, rows, rows.count, p.key_gradient, p.key_partials, f.tokens);
  absorb<2>(f.layout, s, s.query, s.gradient);
  __syncthreads();  // queries and keys may be replaced
}

// Rows of the prefix beyond its length get zeros.
template <class T>
__device__ __forceinline__ void prefix_gradient_tile(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                                     const PrefixShared& s, int64_t token, int64_t end) {
  const PrefixParams<T>& f = p.forward;
  const int count = prefix_rows_at(at, at.prefix_begin, token, end).count;
  const PrefixRows rows = prefix_rows_at(at, at.prefix_begin, token, at.prefix_count);  // maybe none
  load_features(f, rows, f.prefix_key, s.key);
  load_values(f, at, rows, f.prefix_value, true, s.value);
  __syncthreads();  // rows of the prefix are there
  write_value_gradients<T, false>(f, at, s, rows, count, p.prefix_value_gradient);
  linear_gradients<T, PrefixPairs::kNone, kPrefixPieces<T>>(f, s, s.value);
  __syncthreads();  // their gradients are begun
  quadratic_gradients<kPrefixPieces<T>>(f.layout, f.scale, s, s.key, s.value);
  __syncthreads();  // their gradients are written
  store_row_gradients(p, at, s, rows, count, p.prefix_key_gradient, p.prefix_partials, f.prefix_rows);
}

template <class T>
__device__ __forceinline__ void prefix_gradient_range(const PrefixBackwardParams<T>& p, const PrefixPlace& at,
                                                      const PrefixShared& s, const PrefixRange& range) {
#pragma unroll 1
  for (int64_t token = range.begin; token < range.end; token += kPrefixTokens)
    prefix_gradient_tile(p, at, s, token, range.end);
}

// ---- kernels

template <class T>
__global__ void __launch_bounds__(PrefixBackwardConfig::kThreads, PrefixBackwardConfig::kMinBlocks)
    prefix_query_gradient_kernel(PrefixBackwardParams<T> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const PrefixParams<T>& f = p.forward;
  const PrefixShared s(f.layout, memory);
  const PrefixBlock own = prefix_block(f.layout.slices, f.token_pieces);
  write_pairs(f.layout, f.scale, s.pairs);
  ptx::griddepcontrol_wait();
  const PrefixPlace at = prefix_place(f, own);
  const PrefixRange range = prefix_range(own.piece, f.segment, at.count);
  __syncthreads();  // pairs are written
  start_state(f, at, s, own.piece);
#pragma unroll 1
  for (int64_t token = range.begin; token < range.end; token += kPrefixTokens)
    query_gradient_tile(p, at, s, token, range.end);
  ptx::griddepcontrol_launch_dependents();
}

// Of all pieces of the tokens but the first.
template <class T>
__global__ void __launch_bounds__(PrefixBackwardConfig::kThreads, PrefixBackwardConfig::kMinBlocks)
    prefix_gradient_sums_kernel(PrefixBackwardParams<T> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const PrefixParams<T>& f = p.forward;
  const PrefixShared s(f.layout, memory);
  const PrefixBlock own = prefix_block(f.layout.slices, f.token_pieces - 1);
  write_pairs(f.layout, f.scale, s.pairs);
  clear_state(f.layout, s);
  ptx::griddepcontrol_wait();
  const PrefixPlace at = prefix_place(f, own);
  const PrefixRange range = prefix_range(own.piece + 1, f.segment, at.count);
#pragma unroll 1
  for (int64_t token = range.begin; token < range.end; token += kPrefixTokens) {
    const PrefixRows rows = prefix_rows_at(at, at.begin, token, range.end);
    load_features(f, rows, f.query, s.query);
    load_gradients(p, at, s, rows);
    load_denominators(p, at, s, rows);
    __syncthreads();  // queries are there
    scale_gradients(f.layout, at, s);
    __syncthreads();  // their g~ is scaled
    absorb<2>(f.layout, s, s.query, s.gradient);
    __syncthreads();  // queries may be replaced
  }
  store_state(f.layout, s, f.slot(at.lane, at.slice, own.piece + 1));
  ptx::griddepcontrol_launch_dependents();
}

template <class T>
__global__ void __launch_bounds__(PrefixBackwardConfig::kThreads, PrefixBackwardConfig::kMinBlocks)
    prefix_key_gradient_kernel(PrefixBackwardParams<T> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const PrefixParams<T>& f = p.forward;
  const PrefixShared s(f.layout, memory);
  const PrefixBlock own = prefix_block(f.layout.slices, f.token_pieces);
  write_pairs(f.layout, f.scale, s.pairs);
  ptx::griddepcontrol_wait();
  const PrefixPlace at = prefix_place(f, own);
  const PrefixRange range = prefix_range(own.piece, f.segment, at.count);
  __syncthreads();  // pairs are written
  if (f.is_cut())
    load_state(f.slot(at.lane, at.slice, own.piece), f.layout, s);
  else
    pack_state(of_slice(p.gradient, at.slice), at, f.layout, f.scale, s);
  const int64_t tiles = (range.end - range.begin + kPrefixTokens - 1) / kPrefixTokens;
#pragma unroll 1
  for (int64_t tile = tiles - 1; tile >= 0; --tile)
    key_gradient_tile(p, at, s, range.begin + tile * kPrefixTokens, range.end);
  __syncthreads();  // the state is complete, also where there was no tile
  if (own.piece == 0 && p.initial_state != nullptr)
    unpack_state(f.layout, f.scale, at, s, p.gradient, p.initial_state, p.initial_normalizer);
  if (!f.is_cut())
    prefix_gradient_range(p, at, s, {0, at.prefix_rows});
  else if (own.piece == 0)
    store_state(f.layout, s, f.slot(at.lane, at.slice, 0));
  ptx::griddepcontrol_launch_dependents();
}

template <class T>
__global__ void __launch_bounds__(PrefixBackwardConfig::kThreads, PrefixBackwardConfig::kMinBlocks)
    prefix_rows_gradient_kernel(PrefixBackwardParams<T> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const PrefixParams<T>& f = p.forward;
  const PrefixShared s(f.layout, memory);
  const PrefixBlock own = prefix_block(f.layout.slices, f.prefix_pieces);
  write_pairs(f.layout, f.scale, s.pairs);
  ptx::griddepcontrol_wait();
  const PrefixPlace at = prefix_place(f, own);
  load_state(f.slot(at.lane, at.slice, 0), f.layout, s);
  prefix_gradient_range(p, at, s, prefix_range(own.piece, f.segment, at.prefix_rows));
  ptx::griddepcontrol_launch_dependents();
}

// Shares of slices, summed in order: [slices, rows, H, f] -> rows of a tensor, `tokens` for each batch entry.
template <class T>
struct PrefixGatherParams {
  const float* partials;
  HeadRows<T> to;  // from this part of the batch on
  int64_t part, tokens;
  int heads, feature_dim, slices;
};

template <class T>
__global__ void __launch_bounds__(PrefixBackwardConfig::kThreads, PrefixBackwardConfig::kMinBlocks)
    prefix_gather_kernel(PrefixGatherParams<T> p) {
  ptx::griddepcontrol_wait();
  const int64_t size = p.part * p.tokens * p.heads * p.feature_dim;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    float sum = 0;
    for (int slice = 0; slice < p.slices; ++slice) sum += p.partials[slice * size + i];
    const int64_t row = i / p.feature_dim, token = row / p.heads;
    from_float(sum, p.to.at(token / p.tokens, token % p.tokens, row % p.heads)[i % p.feature_dim]);
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
