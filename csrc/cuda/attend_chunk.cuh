// Attention, chunk by chunk: the keys and values of a chunk stay in shared memory while the queries that
// selected it pass by, 64 rows at a time.
//
//   item: one key/value head of one list of index.cuh, up to item_rows of its rows       (persistent blocks)
//     K, V -> shared memory                                     cp.async, once while S <= key_slots tiles
//     for each 64 rows          row r of the list: query list[r / G], head kv_head G + r % G
//       next 64 rows of Q -> the other buffer                   cp.async, under the work on these
//       for each tile of at most kKeys keys
//         S = Q K^T, softmax, O += P V                          a warp owns 16 rows (attend_tile.cuh)
//       O / total and log-sum-exp -> the rows' list positions   one block of memory; attend_merge.cuh adds up
//
// With k = 1 there is nothing to merge: rows leave for `out` and `lse`, with bias and sink.
//
// A chunk of more than key_slots tiles is streamed through the slots instead, once per 64 rows. Items go by
// key/value head first, so the queries of a head (17 MB at T = 64K, D = 128, bf16) stay in L2 while all
// chunks use them. The number of items is read on the device: any grid is right, and one that fills the
// device is best. No block waits for another, every element has one writer, and a row's result does not
// depend on the rows around it.
//
// Bytes per row through L2, 16-bit elements: Q 2 D, partial 2 D (fp32: 4 D) and as much again for the merge,
// 4 S D / (rows of the item) for K and V: 6 to 7 D at S = 64 (fp32: 10 D). Query-stationary kernels move 4 S
// D / G, which is more unless G > 2 S / 3 (fp32: 2 S / 5).
//
// 16-bit partials are fp16, with a power of two per row that brings the row below 2: no overflow whatever V
// holds, and 11 bits for every element within 2^14 of the row's largest. attend_merge.cuh says what that
// costs.
//
// Ranges of queries: a workspace for all partials would take 4 k D H bytes per query, so a call may run
// index, attend and merge on one range after the other and reuse it. A range [q0, q1) of batch entry b is a
// problem of its own: batch = 1, queries = q1 - q0; query, out, lse, indices and bias begin at row (b, q0);
// key and value at b; `slots` counts the range's. Only index_keys_kernel needs to know where the range
// stands: queries_before = q0, queries_behind = T - q1.
#pragma once

#include "cuda/attend_chunk_item.cuh"
#include "cuda/attend_tile.cuh"
#include "cuda/attend_tile_fp32.cuh"
#include "cuda/device.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/memory.cuh"

namespace resona::cuda {

// An instance takes every D <= kDim: rows are filled up with zeros. Its shared memory in KiB, besides 2176
// bytes of tables, as a launch may choose it:
//
//                       16 bits, D = 64   128        256        fp32: 64    128        256
//   keys of a tile      64                64         32         64          32         16
//   1 slot              24                48         64         48          64         96
//   1 slot, ahead       32                64         96         64          96         160
//   2 slots, ahead      48                96         128        96          128        192
//
// sm_86, sm_89 and sm_120 offer 99 KiB per block: there the wider entries give way to the line above. Chunks
// below kKeys take slots of their own size, rounded up to 16 keys.
template <class T, int kHeadDim>
struct AttendChunkConfig {
  using Element = T;
  static constexpr int kDim = kHeadDim;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kRows = 16 * kWarps;  // of a tile
  static constexpr int kRowBytes = kDim * sizeof(T);
  static constexpr int kKeys = 16384 / kRowBytes < 64 ? 16384 / kRowBytes : 64;
  static constexpr int kMostItemRows = 512;
  static constexpr int kLoads = kRowBytes <= 256 ? 4 : 2;  // pieces at once: addresses take registers
  static constexpr int kMinBlocks = kDim <= 128 ? 3 : 2;
  static constexpr int kRegisterCap = 255;  // of D = 256; kMinBlocks holds the others to 168
  using Tile = AttendTile<T, kDim, kKeys>;
  using Rows = typename Tile::Rows;

  static constexpr int kTableBytes = 128 + kMostItemRows * sizeof(int32_t);  // of ChunkStorage

  static constexpr int64_t shared_bytes(int key_rows, int key_slots, bool ahead) {
    return kTableBytes + static_cast<int64_t>(2 * key_rows * key_slots + kRows * (ahead ? 2 : 1)) * kRowBytes;
  }
};

// Views of the dynamic shared memory.
template <class Config>
struct ChunkStorage {
  using Rows = typename Config::Rows;
  unsigned char* memory;
  int key_rows, key_slots;
  static_assert(sizeof(ChunkItem) <= 128);

  __device__ __forceinline__ ChunkItem& item() const { return *reinterpret_cast<ChunkItem*>(memory); }
  // The item's queries, as tokens of their batch entry.
  __device__ __forceinline__ int32_t* tokens() const { return reinterpret_cast<int32_t*>(memory + 128); }
  __device__ __forceinline__ Rows key(int slot) const { return at(2 * slot * key_rows); }
  __device__ __forceinline__ Rows value(int slot) const { return at((2 * slot + 1) * key_rows); }
  __device__ __forceinline__ Rows query(int buffer) const {
    return at(2 * key_slots * key_rows + buffer * Config::kRows);
  }
  __device__ __forceinline__ Rows at(int row) const {
    return {memory + Config::kTableBytes + row * Config::kRowBytes};
  }
};

// ---- loads

template <class Config, class T>
__device__ __forceinline__ void load_tokens(const AttendChunkParams<T>& p, const ChunkItem& item,
                                            const ChunkStorage<Config>& storage) {
  const int queries = item.group.quotient(item.skipped + item.rows - 1) + 1;
  const int64_t before = item.batch * p.attend.queries;
  for (int i = threadIdx.x; i < queries; i += Config::kThreads)
    storage.tokens()[i] = static_cast<int32_t>(p.list[item.list + i] - before);
}

template <class Config, class T>
__device__ __forceinline__ void load_queries(const AttendChunkParams<T>& p, const ChunkItem& item,
                                             const ChunkStorage<Config>& storage, int first_row,
                                             typename Config::Rows to) {
  using Rows = typename Config::Rows;
  const AttendParams<T>& a = p.attend;
#pragma unroll Config::kLoads
  for (int i = threadIdx.x; i < Config::kRows * Rows::kPieces; i += Config::kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces;
    const bool exists = first_row + row < item.rows;
    const int at = item.skipped + (exists ? first_row + row : 0);
    const T* from = a.query.at(item.batch, storage.tokens()[item.group.quotient(at)],
                               item.kv_head * item.group.group + item.group.remainder(at));
    load_piece(to.piece(row, piece), from, piece * Rows::kPieceSize, a.head_dim, exists, a.vector);
  }
}

template <class Config, class T>
__device__ __forceinline__ void load_keys(const AttendChunkParams<T>& p, const ChunkItem& item,
                                          const ChunkStorage<Config>& storage, int64_t first_key, int slot) {
  using Rows = typename Config::Rows;
  const AttendParams<T>& a = p.attend;
  const int64_t left = a.chunk_size - first_key;
  const int rows = left < Config::kKeys ? static_cast<int>(left + 15) / 16 * 16 : Config::kKeys;
  const Rows key = storage.key(slot), value = storage.value(slot);
#pragma unroll Config::kLoads / 2
  for (int i = threadIdx.x; i < rows * Rows::kPieces; i += Config::kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces, first = piece * Rows::kPieceSize;
    const bool exists = row < left;
    const int64_t token = item.token + first_key + (exists ? row : 0);
    load_piece(key.piece(row, piece), a.key.at(item.batch, token, item.kv_head), first, a.head_dim, exists,
               a.vector);
    load_piece(value.piece(row, piece), a.value.at(item.batch, token, item.kv_head), first, a.head_dim,
               exists, a.vector);
  }
}

// One tile of rows against one tile of keys.
struct ChunkStep {
  int number, row_tile, key_tile;

  __device__ __forceinline__ ChunkStep next(int key_tiles) const {
    const bool same_rows = key_tile + 1 < key_tiles;
    return {number + 1, row_tile + !same_rows, same_rows ? key_tile + 1 : 0};
  }
  __device__ __forceinline__ int slot(int key_tiles, int key_slots) const {
    return key_tiles <= key_slots ? key_tile : number % key_slots;
  }
};

template <class Config, class T>
__device__ __forceinline__ void load_step(const AttendChunkParams<T>& p, const ChunkItem& item,
                                          const ChunkStorage<Config>& storage, ChunkStep step,
                                          int key_tiles) {
  if (step.key_tile == 0)
    load_queries(p, item, storage, step.row_tile * Config::kRows,
                 storage.query(p.ahead ? step.row_tile % 2 : 0));
  if (step.row_tile == 0 || key_tiles > p.key_slots)
    load_keys(p, item, storage, static_cast<int64_t>(step.key_tile) * Config::kKeys,
              step.slot(key_tiles, p.key_slots));
  ptx::cp_async_commit_group();
}

// ---- results

// What is added to the logits of a slot; -inf drops its chunk.
template <class T>
__device__ __forceinline__ float slot_bias(const AttendParams<T>& a, int64_t slot, int64_t retrieval_head) {
  if (!a.bias) return 0;
  return a.bias_scale ? a.bias[slot] * a.bias_scale[retrieval_head] : a.bias[slot];
}

__device__ __forceinline__ float with_bias(float lse, float bias) {
  return bias == -kInfinity ? -kInfinity : lse + bias;
}

// A row of the final output, k = 1: its slot is (query, retrieval head).
template <class T>
__device__ __forceinline__ RowEnd end_of_final_row(const AttendParams<T>& a, const ChunkItem& item,
                                                   RowEnd end, int64_t query, int64_t head) {
  const int64_t slot = query * a.retrieval_heads + item.retrieval_head;
  const float lse = with_bias(end.lse, slot_bias(a, slot, item.retrieval_head));
  const RowEnd final_end = end_with_sink(lse, 1, a.sink ? a.sink[head] : -kInfinity);
  return {final_end.factor == 0 ? 0 : end.factor * final_end.factor, final_end.lse};
}

// The warp's 16 rows. 16-bit rows leave through shared memory, where their queries were.
template <class Config, class T>
__device__ __forceinline__ void write_rows(const AttendChunkParams<T>& p, const ChunkItem& item,
                                           const ChunkStorage<Config>& storage, int first_row,
                                           typename Config::Rows staging, const SoftmaxRows& state,
                                           const typename Config::Tile::Output& o) {
  using Tile = typename Config::Tile;
  const AttendParams<T>& a = p.attend;
  const int lane = threadIdx.x % kWarpSize, first_of_warp = threadIdx.x / kWarpSize * 16;
  const bool final_rows = p.result == AttendResult::kFinal;
  const bool half_rows = p.result == AttendResult::kPartialHalf;
  const bool staged = sizeof(T) == 2 && (half_rows || (final_rows && a.vector));
  const int pitch = final_rows ? a.head_dim : partial_pitch(a.head_dim);
  const auto row_of_output = [&](int row) {  // in units of `pitch` elements
    if (!final_rows) return item.partial_row + row;
    const int at = item.skipped + row;
    const int64_t query = item.batch * a.queries + storage.tokens()[item.group.quotient(at)];
    return query * a.heads + item.kv_head * item.group.group + item.group.remainder(at);
  };
  if (staged) __syncwarp();  // ldmatrix has read the queries
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    RowEnd end = end_of_row<Tile>(state, h);
    const PowerOfTwo scale = power_of_two(half_rows ? largest_of_row<Tile>(o, h) * end.factor : 1);
    const int row = first_of_warp + lane / 4 + 8 * h;
    if (first_row + row >= item.rows) continue;
    const int64_t to = row_of_output(first_row + row);
    if (final_rows) end = end_of_final_row(a, item, end, to / a.heads, to % a.heads);
    if (lane % 4 == 0) (final_rows ? a.lse : p.partial_lse)[to] = end.lse;
    if (lane % 4 == 0 && half_rows) p.partial_scale[to] = scale.value;
    if (p.result == AttendResult::kPartialFloat)
      store_row<Tile>(static_cast<float*>(p.partial) + to * pitch, o, h, end.factor, pitch, true);
    else if constexpr (sizeof(T) == 2) {
      if (half_rows)
        stage_row<Tile, Half>(staging, row, o, h, end.factor * scale.inverse);
      else if (staged)
        stage_row<Tile>(staging, row, o, h, end.factor);
      else
        store_row<Tile>(a.out + to * pitch, o, h, end.factor, pitch, false);
    } else {
      store_row<Tile>(a.out + to * pitch, o, h, end.factor, pitch, a.vector);
    }
  }
  if (!staged) return;
  __syncwarp();
  constexpr int kPieces = Config::Rows::kPieces;
  T* const results = final_rows ? a.out : static_cast<T*>(p.partial);  // 16 bits are 16 bits
#pragma unroll 2
  for (int i = lane; i < 16 * kPieces; i += kWarpSize) {
    const int row = first_of_warp + i / kPieces, piece = i % kPieces, column = piece * (16 / sizeof(T));
    if (first_row + row >= item.rows || column >= pitch) continue;
    ptx::st_global_v4(results + row_of_output(first_row + row) * pitch + column,
                      *reinterpret_cast<const uint4*>(staging.piece(row, piece)));
  }
}

// With k = 1, rows that selected nothing are in no list. A warp takes a slot and zeroes its heads.
template <class Config, class T>
__device__ __forceinline__ void write_unselected(const AttendChunkParams<T>& p) {
  const AttendParams<T>& a = p.attend;
  const int lane = threadIdx.x % kWarpSize, heads = a.heads / a.retrieval_heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Config::kWarps;
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * Config::kWarps + threadIdx.x / kWarpSize;
       slot < p.slots; slot += step) {
    if (p.position[slot] >= 0) continue;
    const int64_t first = slot * heads;  // = query H + retrieval head H / R
    for (int64_t i = lane; i < static_cast<int64_t>(heads) * a.head_dim; i += kWarpSize)
      a.out[first * a.head_dim + i] = T();
    for (int i = lane; i < heads; i += kWarpSize)
      a.lse[first + i] = a.sink ? a.sink[(first + i) % a.heads] : -kInfinity;
  }
}

// ---- the kernel

template <class Config, class T>
__device__ __forceinline__ void attend_item(const AttendChunkParams<T>& p, const ChunkItem& item,
                                            const ChunkStorage<Config>& storage) {
  using Tile = typename Config::Tile;
  const int64_t chunk_size = p.attend.chunk_size;
  const int key_tiles = static_cast<int>((chunk_size + Config::kKeys - 1) / Config::kKeys);
  const int row_tiles = (item.rows + Config::kRows - 1) / Config::kRows;
  const int first_of_warp = threadIdx.x / kWarpSize * 16;
  const float scale = p.attend.scale * Tile::kUnitsPerNat;
  SoftmaxRows state;
  typename Tile::Output o;
  if (p.ahead) load_step(p, item, storage, ChunkStep{0, 0, 0}, key_tiles);
  for (ChunkStep step{0, 0, 0}; step.row_tile < row_tiles; step = step.next(key_tiles)) {
    if (!p.ahead) {
      __syncthreads();  // the step before has been read
      load_step(p, item, storage, step, key_tiles);
    }
    ptx::cp_async_wait_all();
    __syncthreads();  // this step is there, and with `ahead` the one before has been read
    const ChunkStep next = step.next(key_tiles);
    if (p.ahead && next.row_tile < row_tiles) load_step(p, item, storage, next, key_tiles);

    const int first_row = step.row_tile * Config::kRows;
    if (first_row + first_of_warp >= item.rows) continue;
    const int64_t left = chunk_size - static_cast<int64_t>(step.key_tile) * Config::kKeys;
    const int keys = left < Config::kKeys ? static_cast<int>(left) : Config::kKeys;
    const int slot = step.slot(key_tiles, p.key_slots);
    const auto query = storage.query(p.ahead ? step.row_tile % 2 : 0);
    typename Tile::Scores s;
    if (step.key_tile == 0) clear<Tile>(state, o);
    Tile::multiply_keys(s, query, first_of_warp, storage.key(slot), keys);
    scale_scores<Tile>(s, scale, keys);
    softmax<Tile>(s, state, o, keys, step.key_tile == 0);
    Tile::add_values(o, s, storage.value(slot), keys);
    if (next.row_tile != step.row_tile) write_rows(p, item, storage, first_row, query, state, o);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_chunk_kernel(AttendChunkParams<typename Config::Element> p) {
  RESONA_DYNAMIC_SHARED(memory);
  const ChunkStorage<Config> storage{memory, p.key_rows, p.key_slots};
  ptx::griddepcontrol_wait();
  const int64_t tiles = p.keys > 0 ? work_items(p.tile_begin, p.tile_totals, p.keys) : 0;
  const int64_t items = tiles * p.kv_count;
  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    const ChunkItem item = find_item(p, tiles, number);
    __syncthreads();  // the item before has been worked off
    if (threadIdx.x == 0) storage.item() = item;
    load_tokens(p, item, storage);
    __syncthreads();
    attend_item(p, storage.item(), storage);
  }
  if (p.result == AttendResult::kFinal) write_unselected<Config>(p);
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, D at most). A launch takes the first that holds a row.
#define RESONA_ATTEND_CHUNK_INSTANCES(X) \
  X(BFloat16, 64)                        \
  X(BFloat16, 128)                       \
  X(BFloat16, 256)                       \
  X(Half, 64)                            \
  X(Half, 128)                           \
  X(Half, 256)                           \
  X(float, 64)                           \
  X(float, 128)                          \
  X(float, 256)

}  // namespace resona::cuda
