// Gradients of attention, chunk by chunk: the keys and values of a chunk stay in shared memory while the rows
// that selected it pass by.
//
//   item: one key/value head of one segment of a list of index.cuh                    (persistent blocks)
//     for each tile of keys (one while S <= kTile)
//       K, V -> shared memory; d K, d V = 0 in registers
//       for each kTile rows           row r: query list[r / G], head kv_head G + r % G
//         S = Q K^T, d P = d O V^T                          a warp: 16 rows, half of the keys
//         P = exp(scale S + bias - lse) factor, d S = P (d P - delta) -> shared memory
//         d V += P^T d O,  d K += d S^T Q                   a warp: 16 keys, half of the columns
//         Q, d O of the next rows -> shared memory          cp.async, under the next line
//         d S K -> query_partial, at the rows' list positions; with k = 1, times scale, the gradient
//       d K, d V -> the gradients, or the slab if the list has several segments
//
// With more than one tile of keys, what a lane adds to query_partial it has itself written before. Every
// element of a partial result has one writer, segments end at fixed places and are added up in order
// (attend_backward_rows.cuh), so the result is the same bit for bit on every run and any grid.
//
// The lse is rounded once: under a bias of 10^4 that is 5e-4 of every weight. So a call with a bias, and any
// in fp32, first runs this kernel with `only_sums`, which finds S and the sums of its exponentials, and
// scales all weights of a row by 1 / sum. Without a bias the lse is as exact as 16-bit logits.
//
// Bytes per row and key/value head, 16-bit elements: Q and d O 4 D gathered through L2, query_partial 4 D
// written and 4 D read; K and V 4 S D and, for lists of several segments, 16 S D of slab per segment. The
// gathers and partials are the bound at S = 64: 12 D bytes for 10 S D FLOP.
#pragma once

#include "cuda/attend_backward_params.cuh"
#include "cuda/attend_backward_storage.cuh"
#include "cuda/attend_backward_tile.cuh"
#include "cuda/attend_chunk.cuh"

namespace resona::cuda {

// An instance takes every D <= kDim: rows are filled up with zeros. A tile is kTile rows by kTile keys, with
// a warp for each 16 rows and half of the keys. Shared memory, KiB: 16 bits 57, 89, 75; fp32 47, 79, 72; a
// block may have 99 on every device.
template <class T, int kHeadDim>
struct AttendBackwardConfig {
  using Element = T;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRowBytes = kDim * sizeof(T);
  static constexpr int kTile = kDim <= 128 ? (sizeof(T) == 2 ? 64 : 32) : (sizeof(T) == 2 ? 32 : 16);
  static constexpr int kThreads = 4 * kTile;
  static constexpr int kMinBlocks = kDim <= 128 && sizeof(T) == 2 ? 2 : 1;
  static constexpr int kRegisterCap = 240;  // of D = 256 and fp32; kMinBlocks holds the others to 128
  using Tile = BackwardTile<T, kDim, kTile>;
  using Rows = typename Tile::Rows;
  using Weights = typename Tile::Weights;

  static constexpr int kMostSegment = 1024;  // rows
  static constexpr int kItemBytes = 128;
  static constexpr int kListBytes = kMostSegment * sizeof(uint32_t);
  static constexpr int kRowTableBytes = 4 * sizeof(float) * kTile;  // token, shift, factor, delta
  static constexpr int kSumBytes = 2 * sizeof(float) * kTile;
  static constexpr int kTableBytes =
      (kItemBytes + kListBytes + 2 * kRowTableBytes + kSumBytes + 127) / 128 * 128;
  static constexpr int kTensorBytes = kTile * kRowBytes;
  static constexpr int kWeightBytes = kTile * Weights::kPitch;
  static constexpr int kSharedBytes = kTableBytes + 4 * kTensorBytes + 2 * kWeightBytes;
  static_assert(kSharedBytes <= 99 * 1024);
  static_assert(kTableBytes % 128 == 0 && kWeightBytes % 16 == 0);
};

// ---- loads

// Thread i's row of a tile; threads beyond its rows get none.
template <class Config, class T>
__device__ __forceinline__ RowEntry find_row(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                             const BackwardStorage<Config>& storage, int first_row) {
  const int row = first_row + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) >= Config::kTile || row >= item.rows) return {-1, 0, 0, 0};
  const int query_of_item = item.group.quotient(item.skipped + row);
  return row_entry(p, item, row, query_of_item, storage.list()[query_of_item]);
}

template <class Config>
__device__ __forceinline__ void keep_row(RowTable<Config::kTile>& table, const RowEntry& row) {
  const int i = threadIdx.x;
  if (i >= Config::kTile) return;
  table.token[i] = row.token, table.shift[i] = row.shift;
  table.factor[i] = row.factor, table.delta[i] = row.delta;
}

template <class Config, class T>
__device__ __forceinline__ void load_rows(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                          const BackwardStorage<Config>& storage, int first_row, int rows) {
  using Rows = typename Config::Rows;
  const AttendParams<T>& a = p.attend;
  const auto& table = storage.table(first_row);
  const int whole_rows = (rows + 15) / 16 * 16;
#pragma unroll 1
  for (int i = threadIdx.x + item.zero; i < whole_rows * Rows::kPieces; i += Config::kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces, first = piece * Rows::kPieceSize;
    const bool exists = table.token[row] >= 0;
    const int64_t token = exists ? table.token[row] : 0;
    const int at = item.skipped + (exists ? first_row + row : 0);
    const int64_t head = item.kv_head * item.group.group + item.group.remainder(at);
    load_piece(storage.query().piece(row, piece), a.query.at(item.batch, token, head), first, a.head_dim,
               exists, a.vector);
    if (p.only_sums) continue;
    load_piece(storage.out_gradient().piece(row, piece), p.out_gradient.at(item.batch, token, head), first,
               a.head_dim, exists, a.vector);
  }
  ptx::cp_async_commit_group();
}

template <class Config, class T>
__device__ __forceinline__ void load_keys(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                          const BackwardStorage<Config>& storage, int64_t first_key,
                                          int keys) {
  using Rows = typename Config::Rows;
  const AttendParams<T>& a = p.attend;
  const int rows = (keys + 15) / 16 * 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * Rows::kPieces; i += Config::kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces, first = piece * Rows::kPieceSize;
    const bool exists = row < keys;
    const int64_t token = item.token + first_key + (exists ? row : 0);
    load_piece(storage.key().piece(row, piece), a.key.at(item.batch, token, item.kv_head), first, a.head_dim,
               exists, a.vector);
    if (p.only_sums) continue;
    load_piece(storage.value().piece(row, piece), a.value.at(item.batch, token, item.kv_head), first,
               a.head_dim, exists, a.vector);
  }
  ptx::cp_async_commit_group();
}

// ---- weights

// The warp's scores and their gradients to weights and d logit, in shared memory as operands; the sums of
// what row_sums wants. Keys and rows that do not exist get zeros, so that no NaN of others reaches them.
template <class Config, class T>
__device__ __forceinline__ void write_weights(const AttendBackwardParams<T>& p,
                                              const BackwardStorage<Config>& storage,
                                              const typename Config::Tile::Scores& s,
                                              const typename Config::Tile::Scores& weight_gradient,
                                              WarpPart part, const BackwardStep& step) {
  constexpr int kWarpKeys = Config::Tile::kWarpKeys;
  const int g = part.lane / 4, t = part.lane % 4;
  const auto& table = storage.table(step.first_row);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = part.row + g + 8 * h;
    const bool exists = table.token[row] >= 0;
    const float shift = table.shift[row], factor = table.factor[row], delta = table.delta[row];
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n) {
      float weight[2], gradient[2];
      const int key = part.half * kWarpKeys + 8 * n + 2 * t;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool counts = exists && key + e < step.keys;
        const float x = __fmaf_rn(s.at[n][2 * h + e], p.attend.scale, shift);
        weight[e] = counts ? exp_of(x) * factor : 0;
        gradient[e] = counts ? weight[e] * (weight_gradient.at[n][2 * h + e] - delta) : 0;
        sum += p.only_sums ? weight[e] : gradient[e];
      }
      if (p.only_sums) continue;
      store_run(storage.weight().at(row, key), weight);
      store_run(storage.logit_gradient().at(row, key), gradient);
    }
    sum = quad_sum(sum);
    if (t == 0) storage.sums(part.half)[row] = sum;
  }
}

template <class Config, class T>
__device__ __forceinline__ void make_weights(const AttendBackwardParams<T>& p,
                                             const BackwardStorage<Config>& storage,
                                             const BackwardStep& step) {
  using Tile = typename Config::Tile;
  const WarpPart part = part_of_rows(storage);
  if (part.row >= step.rows) return;
  const int first_key = part.half * Tile::kWarpKeys;
  typename Tile::Scores s, weight_gradient;
  Tile::multiply(part.lane, s, storage.query(), part.row, storage.key(), first_key, step.keys);
  if (p.only_sums)
    weight_gradient.clear();
  else
    Tile::multiply(part.lane, weight_gradient, storage.out_gradient(), part.row, storage.value(), first_key,
                   step.keys);
  write_weights(p, storage, s, weight_gradient, part, step);
}

// ---- results

template <class Config, class T>
__device__ __forceinline__ void write_row_sums(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                               const BackwardStorage<Config>& storage,
                                               const BackwardStep& step) {
  const int row = threadIdx.x;
  if (!p.row_sums || row >= step.rows) return;
  float* to = p.row_sums + item.partial_row + step.first_row + row;
  const float sum = storage.sums(0)[row] + storage.sums(1)[row];
  *to = step.first_key == 0 ? sum : *to + sum;
}

// The rows' d logit K, from column `first` on: to their list positions; with k = 1, where nothing is to be
// added, to the gradient.
template <class Config, class T>
__device__ __forceinline__ void write_query_columns(const AttendBackwardParams<T>& p,
                                                    const BackwardItem& item,
                                                    const BackwardStorage<Config>& storage, WarpPart part,
                                                    int first, const BackwardStep& step) {
  const int pitch = partial_pitch(p.attend.head_dim), row = part.row + part.lane / 4;
  float* to = p.query_partial ? p.query_partial + (item.partial_row + step.first_row + row) * pitch : nullptr;
  typename Config::Tile::QuerySums sums;
  sums.clear();
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (step.first_key > 0 && row + 8 * h < step.rows)
      load_sums(part.lane, sums, to + 8 * h * pitch, h, first, pitch);
  Config::Tile::multiply_weights(part.lane, sums, storage.logit_gradient(), part.row, storage.key(), first,
                                 step.keys);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row + 8 * h >= step.rows) continue;
    if (p.query_partial) {
      store_sums(part.lane, to + 8 * h * pitch, sums, h, 1, first, pitch, true);
      continue;
    }
    const int token = storage.table(step.first_row).token[row + 8 * h];
    const int head = item.group.remainder(item.skipped + step.first_row + row + 8 * h);
    if (token >= 0)
      store_sums(part.lane, p.query_gradient.at(item.batch, token, item.kv_head * item.group.group + head),
                 sums, h, p.attend.scale, first, p.attend.head_dim, p.attend.vector);
  }
}

template <class Config, class T>
__device__ __forceinline__ void write_query_sums(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                                 const BackwardStorage<Config>& storage,
                                                 const BackwardStep& step) {
  const WarpPart part = part_of_rows(storage);
  if (part.row >= step.rows) return;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {  // half at a time: d K and d V take the registers
    const int first = part.half * Config::Tile::kWarpDim + i * Config::Tile::kWarpDim / 2;
    if (first < partial_pitch(p.attend.head_dim)) write_query_columns(p, item, storage, part, first, step);
  }
}

// The warp's 16 keys: to the gradient itself, to what ranges of queries add up, or to the slab.
template <class Config, class T>
__device__ __forceinline__ void write_key_sums(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                               const BackwardStorage<Config>& storage,
                                               const typename Config::Tile::Sums& sums, int which,
                                               const HeadRows<T>& gradient, float factor,
                                               const BackwardStep& step) {
  const WarpPart part = part_of_keys(storage);
  const int first = part.half * Config::Tile::kWarpDim, pitch = partial_pitch(p.attend.head_dim);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = part.row + part.lane / 4 + 8 * h;
    if (key >= step.keys) continue;
    const int64_t of_chunk = step.first_key + key, token = item.token + of_chunk;
    if (item.slab >= 0)
      store_sums(part.lane, p.slab + ((item.slab * 2 + which) * p.attend.chunk_size + of_chunk) * pitch, sums,
                 h, factor, first, pitch, true);
    else if (p.carried)
      add_sums(part.lane,
               p.carried + (p.carried_row(token, item.retrieval_head, item.kv) * 2 + which) * pitch, sums, h,
               factor, first, pitch);
    else
      store_sums(part.lane, gradient.at(item.batch, token, item.kv_head), sums, h, factor, first,
                 p.attend.head_dim, p.attend.vector);
  }
}

// ---- the kernel

// All rows of an item against one tile of keys. A pass that only wants sums leaves out most of it.
template <class Config, class T>
__device__ __forceinline__ void backward_keys(const AttendBackwardParams<T>& p, const BackwardItem& item,
                                              const BackwardStorage<Config>& storage, int first_key,
                                              int keys) {
  using Tile = typename Config::Tile;
  typename Tile::Sums key_sums, value_sums;
  key_sums.clear(), value_sums.clear();
  const auto rows_at = [&](int first) { return min(Config::kTile, item.rows - first); };
  __syncthreads();  // the tile of keys before has been worked off
  load_keys(p, item, storage, first_key, keys);
  keep_row<Config>(storage.table(0), find_row(p, item, storage, 0));
  __syncthreads();
  load_rows(p, item, storage, 0, rows_at(0));
  BackwardStep step{0, rows_at(0), first_key, keys};
  while (true) {
    const int next = step.first_row + Config::kTile;
    ptx::cp_async_wait_all();
    __syncthreads();  // this step is there
    make_weights(p, storage, step);
    __syncthreads();  // weights are there
    const RowEntry next_row = find_row(p, item, storage, next);
    const WarpPart part = part_of_keys(storage);
    if (!p.only_sums && part.row < keys) {
      const int first = part.half * Tile::kWarpDim;
      Tile::multiply_transposed(part.lane, value_sums, storage.weight(), part.row, storage.out_gradient(),
                                first, step.rows);
      Tile::multiply_transposed(part.lane, key_sums, storage.logit_gradient(), part.row, storage.query(),
                                first, step.rows);
    }
    keep_row<Config>(storage.table(next), next_row);
    write_row_sums(p, item, storage, step);
    __syncthreads();  // Q and d O have been read
    if (next < item.rows) load_rows(p, item, storage, next, rows_at(next));
    if (!p.only_sums) write_query_sums(p, item, storage, step);
    if (next >= item.rows) break;
    step = {next, rows_at(next), first_key, keys};
  }
  if (p.only_sums) return;
  write_key_sums(p, item, storage, key_sums, 0, p.key_gradient, p.attend.scale, step);
  write_key_sums(p, item, storage, value_sums, 1, p.value_gradient, 1, step);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_backward_kernel(AttendBackwardParams<typename Config::Element> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const BackwardStorage<Config> storage{memory};
  ptx::griddepcontrol_wait();
  const int key_tiles = static_cast<int>((p.attend.chunk_size + Config::kTile - 1) / Config::kTile);
  for (int64_t number = blockIdx.x; number < p.segments() * p.heads; number += gridDim.x) {
    const BackwardItem item = find_backward_item(p, p.segments(), number);
    __syncthreads();  // the item before has been worked off
    if (threadIdx.x == 0) storage.item() = item;
    const int queries = item.group.quotient(item.skipped + item.rows - 1) + 1;
    for (int i = threadIdx.x; i < queries; i += Config::kThreads) storage.list()[i] = p.list[item.list + i];
    __syncthreads();
    for (int tile = 0; tile < key_tiles; ++tile) {
      const int64_t left = p.attend.chunk_size - static_cast<int64_t>(tile) * Config::kTile;
      backward_keys(p, storage.item(), storage, tile * Config::kTile,
                    left < Config::kTile ? static_cast<int>(left) : Config::kTile);
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, D at most). A launch takes the first that holds a row.
#define RESONA_ATTEND_BACKWARD_INSTANCES(X) \
  X(BFloat16, 64)                           \
  X(BFloat16, 128)                          \
  X(BFloat16, 256)                          \
  X(Half, 64)                               \
  X(Half, 128)                              \
  X(Half, 256)                              \
  X(float, 64)                              \
  X(float, 128)                             \
  X(float, 256)

}  // namespace resona::cuda
