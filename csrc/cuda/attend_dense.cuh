// Attention over a dense causal tile with a mask: for contexts so short that the rows of a tile together
// select most of what they may.
//
//   a block takes 64 rows of a key/value head: neighbouring queries times the heads of the group
//     Q -> shared memory
//     for each window of 1024 keys in the tile's past
//       each row's chunks -> its bits of 1024          two threads per row, no atomics
//       or over the rows  -> tiles that anyone reads
//       for each such tile of 64 keys
//         wait for K; load V meanwhile:  S = Q K^T                          mma, 16 rows per warp
//         wait for V; load K of the next tile meanwhile:  mask, softmax, O += P V
//     sink, division, out and lse
//
// Bytes: per 64 rows, K and V of the tiles that any of them reads, so at most 4 D L / 64 per row and
// key/value head in 16-bit types, where a query-stationary kernel moves 4 D k S / G. Work: 4 D operations per
// row and key of those tiles, of which k S / L are wanted. No index is built and nothing is merged.
//
// A bit cannot count: each chunk may occur once in a row's slots, which holds for what `retrieve` returns.
// Nor can it carry a number: problems with a bias take another path. So does fp32.
//
// Rows may select anything, so a NaN or an infinity in a value row must not reach rows that mask it, and zero
// times either is NaN. Rows that end up not finite are therefore computed again, from their own chunks alone
// (attend_query.cuh): never on sound data.
#pragma once

#include "cuda/attend_params.cuh"
#include "cuda/attend_query.cuh"
#include "cuda/attend_tile.cuh"
#include "cuda/device.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/griddepcontrol.cuh"

namespace resona::cuda {

template <class T, int kMostDim, int kKeysOfTile>
struct AttendDenseConfig {
  using Element = T;
  using Tile = AttendTile<T, kMostDim, kKeysOfTile>;
  using Again = AttendQueryConfig<T, kMostDim / 8, 1, false>;  // of rows that are not finite
  static constexpr int kDim = kMostDim;
  static constexpr int kKeys = kKeysOfTile;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kWarpRows = 16;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kWindow = 1024;
  static constexpr int kHalfWindow = kWindow / 2;  // of one thread
  static constexpr int kWords = kWindow / 32;
  static constexpr int kRegisterCap = 255;
  static constexpr int kMinBlocks = kDim <= 128 ? 3 : 2;
  static_assert(kThreads == 2 * kRows, "two threads build the mask of a row");
  static_assert(kWindow / kKeys <= 32 && kKeys % 32 == 0, "a word has a bit per tile");
};

// Row r of a block is row first + r of [T, G], which has less than 2^31: contexts are short here.
struct DenseBlock {
  int batch, kv_head, first;
  int begin, end;  // tokens that its rows may read
};

// Dynamic shared memory: 33 KB at D = 64, 57 KB at 128, 73 KB at 256 with 32 keys.
template <class Config>
struct AttendDenseStorage {
  alignas(128) unsigned char query[Config::kRows * Config::kDim * 2];  // in the end the output
  alignas(128) unsigned char key[Config::kKeys * Config::kDim * 2];
  alignas(128) unsigned char value[Config::kKeys * Config::kDim * 2];
  uint32_t mask[Config::kRows][Config::kWords + 1];  // an odd stride: rows begin in different banks
  uint32_t tiles[Config::kWarps];                    // those that any row of the warp's threads reads
  DenseBlock block;                                  // here because registers are scarce
};

template <class T>
__device__ __forceinline__ QueryRow dense_row(const AttendParams<T>& p, const DenseBlock& block, int row) {
  const int group = p.group();
  const int i = block.first + row;
  return {block.batch, i / group, block.kv_head, block.kv_head * group + i % group,
          i < p.queries * group ? 1 : 0};
}

// The longest tiles begin first.
template <class Config, class T>
__device__ __forceinline__ DenseBlock dense_block(const AttendParams<T>& p) {
  const int pairs = static_cast<int>(p.batch) * p.kv_heads, pair = blockIdx.x % pairs;
  const int tile = (gridDim.x - 1 - blockIdx.x) / pairs;
  DenseBlock block{pair / p.kv_heads, pair % p.kv_heads, tile * Config::kRows, 0, 0};
  const int left = static_cast<int>(p.queries) * p.group() - block.first;
  const int last = left < Config::kRows ? left - 1 : Config::kRows - 1;
  block.begin = static_cast<int>(p.place(dense_row(p, block, 0).query).token_begin);
  block.end = static_cast<int>(dense_row(p, block, last).query + p.context - p.queries);
  return block;
}

// Copies kRows rows to shared memory, asynchronously where they are aligned: source(row, exists).
template <int kRows, class Config, class Source>
__device__ __forceinline__ void load_rows(unsigned char* to, int dim, bool vector, const Source& source) {
  using Rows = typename Config::Tile::Rows;
  const Rows rows{to};
#pragma unroll
  for (int i = threadIdx.x; i < kRows * Rows::kPieces; i += Config::kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces;
    bool exists;
    const auto* from = source(row, exists);
    load_piece(rows.piece(row, piece), from, piece * Rows::kPieceSize, dim, exists, vector);
  }
}

template <class Config, class T>
__device__ __forceinline__ void load_queries(const AttendParams<T>& p, AttendDenseStorage<Config>& storage) {
  load_rows<Config::kRows, Config>(storage.query, p.head_dim, p.vector, [&](int r, bool& exists) {
    const QueryRow row = dense_row(p, storage.block, r);
    exists = row.heads > 0;
    return exists ? p.query.at(row.batch, row.query, row.head) : p.query.data;
  });
  ptx::cp_async_commit_group();
}

// Keys or values from token `first` on; rows beyond the block's past are zeros.
template <class Config, class T>
__device__ __forceinline__ void load_tokens(const AttendParams<T>& p, const DenseBlock& block,
                                            const HeadRows<const T>& tokens, int first, unsigned char* to) {
  const T* base = tokens.at(block.batch, first, block.kv_head);
  load_rows<Config::kKeys, Config>(to, p.head_dim, p.vector, [&](int r, bool& exists) {
    exists = first + r < block.end;
    return exists ? base + r * tokens.token_stride : tokens.data;
  });
  ptx::cp_async_commit_group();
}

// The thread's half of its row's mask over keys window, window + 1, ... Where the row stands is worked out
// for every window: registers are scarce, windows are not many.
template <class Config, class T>
__device__ __forceinline__ void build_mask(const AttendParams<T>& p, AttendDenseStorage<Config>& storage,
                                           int window) {
  constexpr int kHalf = Config::kHalfWindow;
  const int half = threadIdx.x % 2;
  uint32_t* words = storage.mask[threadIdx.x / 2] + half * kHalf / 32;
#pragma unroll
  for (int w = 0; w < kHalf / 32; ++w) words[w] = 0;
  const QueryRow row = dense_row(p, storage.block, threadIdx.x / 2);
  const QueryPlace place = p.place(row.query);
  const int64_t position =
      (row.batch * p.queries + row.query) * p.retrieval_heads + p.retrieval_head(row.kv_head);
  const int32_t* indices = p.indices + position * p.top_k;
  const int64_t count = row.heads > 0 && place.eligible > 0 ? p.top_k : 0;
  uint32_t tiles = 0;
#pragma unroll 2
  for (int64_t j = 0; j < count; ++j) {
    const int index = indices[j];
    if (index < 0 || index >= place.eligible) continue;
    const int chunk_size = static_cast<int>(p.chunk_size);  // no more than the context: the row has a chunk
    const int begin = static_cast<int>(place.token_begin) + index * chunk_size - window - half * kHalf;
    if (begin >= kHalf || begin + chunk_size <= 0) continue;
    const int low = begin < 0 ? 0 : begin;
    const int high = chunk_size < kHalf - begin ? begin + chunk_size : kHalf;
    for (int w = low / 32; w <= (high - 1) / 32; ++w) {
      uint32_t bits = ~0u;
      if (32 * w < low) bits &= ~0u << (low - 32 * w);
      if (32 * w + 32 > high) bits &= ~0u >> (32 * w + 32 - high);
      words[w] |= bits;
      tiles |= 1u << ((half * kHalf + 32 * w) / Config::kKeys);
    }
  }
  tiles = __reduce_or_sync(kAllLanes, tiles);
  if (threadIdx.x % kWarpSize == 0) storage.tiles[threadIdx.x / kWarpSize] = tiles;
}

// Products to logits in the tile's units, -inf where the row does not read the key. `words` are the tile's
// words of the mask of the lane's row g.
template <class Config>
__device__ __forceinline__ void mask_scores(typename Config::Tile::Scores& s, float scale,
                                            const uint32_t* words) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int w = 0; w < Config::kKeys / 32; ++w) {
      const uint32_t bits = words[half * 8 * (Config::kWords + 1) + w] >> (threadIdx.x % 4 * 2);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = s.at[4 * w + i / 2][2 * half + i % 2];
        x = bits >> (i / 2 * 8 + i % 2) & 1 ? x * scale : -kInfinity;
      }
    }
}

template <class Config, class T>
__device__ __forceinline__ void attend_window(const AttendParams<T>& p, AttendDenseStorage<Config>& storage,
                                              int window, SoftmaxRows& rows,
                                              typename Config::Tile::Output& o) {
  using Tile = typename Config::Tile;
  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4;
  uint32_t left = 0;
#pragma unroll
  for (int w = 0; w < Config::kWarps; ++w) left |= storage.tiles[w];
  if (left == 0) {
    __syncthreads();  // `tiles` is read before the next window replaces it; else the loop's barriers see to
                      // it
    return;
  }
  const auto first_key = [&](uint32_t tiles) {
    return window + (__ffs(static_cast<int>(tiles)) - 1) * Config::kKeys;
  };
  load_tokens<Config>(p, storage.block, p.key, first_key(left), storage.key);
  while (left) {
    const int key = first_key(left);
    left &= left - 1;
    ptx::cp_async_wait_all();
    __syncthreads();  // K is here, and everyone has used the V before
    load_tokens<Config>(p, storage.block, p.value, key, storage.value);
    typename Tile::Scores s;
    Tile::multiply_keys(s, {storage.query}, warp * Config::kWarpRows, {storage.key}, Config::kKeys);
    mask_scores<Config>(s, p.scale * Tile::kUnitsPerNat,
                        storage.mask[warp * Config::kWarpRows + g] + (key - window) / 32);
    ptx::cp_async_wait_all();
    __syncthreads();  // V is here, and everyone has used K
    if (left) load_tokens<Config>(p, storage.block, p.key, first_key(left), storage.key);
    softmax<Tile>(s, rows, o, Config::kKeys, false);
    Tile::add_values(o, s, {storage.value}, Config::kKeys);
  }
}

// Ends the two rows of a lane: lse to memory, the output to shared memory. The bits of the warp's rows that
// are not finite are left to write_again.
template <class Config, class T>
__device__ __forceinline__ uint32_t end_rows(const AttendParams<T>& p, AttendDenseStorage<Config>& storage,
                                             const SoftmaxRows& rows,
                                             const typename Config::Tile::Output& o) {
  using Tile = typename Config::Tile;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  uint32_t broken = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = warp * Config::kWarpRows + lane / 4 + 8 * h;
    const QueryRow row = dense_row(p, storage.block, r);
    const float total = quad_sum(rows.total[h]);
    const bool sinks = p.sink && row.heads > 0;
    const RowEnd end =
        end_with_sink(rows.peak[h] * Tile::kNatsPerUnit, total, sinks ? p.sink[row.head] : -kInfinity);
    bool finite = true;
#pragma unroll
    for (int run = 0; run < Tile::kRuns; ++run)
#pragma unroll
      for (int i = 0; i < Tile::kRun; ++i)
        finite = finite && fabsf(scaled(o.at[run][h * Tile::kRun + i], end.factor)) < kInfinity;
    const uint32_t votes = __ballot_sync(kAllLanes, !finite && row.heads > 0);
#pragma unroll
    for (int g = 0; g < 8; ++g)
      if (votes >> (4 * g) & 0xf) broken |= 1u << (8 * h + g);
    if (row.heads > 0 && lane % 4 == 0 && !(broken >> (lane / 4 + 8 * h) & 1))
      p.lse[(row.batch * p.queries + row.query) * p.heads + row.head] = end.lse;
    stage_row<Tile>({storage.query}, r, o, h, end.factor);
  }
  return broken;
}

// The warp's rows from shared memory to `out`, but for the broken ones.
template <class Config, class T>
__device__ __forceinline__ void write_rows(const AttendParams<T>& p, AttendDenseStorage<Config>& storage,
                                           uint32_t broken) {
  using Rows = typename Config::Tile::Rows;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Rows rows{storage.query};
#pragma unroll 2
  for (int i = lane; i < Config::kWarpRows * Rows::kPieces; i += kWarpSize) {
    const int r = i / Rows::kPieces, piece = i % Rows::kPieces, e = piece * Rows::kPieceSize;
    const QueryRow row = dense_row(p, storage.block, warp * Config::kWarpRows + r);
    if (row.heads == 0 || broken >> r & 1 || e >= p.head_dim) continue;
    T* to = p.out + ((row.batch * p.queries + row.query) * p.heads + row.head) * p.head_dim + e;
    Pack<T, true> pack;
    pack.words = *reinterpret_cast<const uint4*>(rows.piece(warp * Config::kWarpRows + r, piece));
    if (p.vector) {
      pack.store(to);
      continue;
    }
#pragma unroll
    for (int j = 0; j < Rows::kPieceSize; ++j)
      if (e + j < p.head_dim) to[j] = pack.at[j];
  }
}

template <class Config, class T>
__device__ __forceinline__ void write_again(const AttendParams<T>& p,
                                            const AttendDenseStorage<Config>& storage, uint32_t broken) {
  using Again = typename Config::Again;
  constexpr int kTeams = kWarpSize / Again::kLanes;
  const int warp = threadIdx.x / kWarpSize, team = threadIdx.x % kWarpSize / Again::kLanes;
#pragma unroll 1
  for (int first = 0; first < Config::kWarpRows; first += kTeams) {
    QueryRow row = dense_row(p, storage.block, warp * Config::kWarpRows + first + team);
    if (!(broken >> (first + team) & 1)) row.heads = 0;
    QueryState<Again> state;
    attend_query_keys<Again>(p, row, 0, 1, state);
    write_query_row<Again>(p, row, state);
  }
}

// A block per 64 rows of [T, G], key/value head and batch entry.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_dense_kernel(AttendParams<typename Config::Element> p) {
  using Tile = typename Config::Tile;
  RESONA_DYNAMIC_SHARED(memory);
  auto& storage = *reinterpret_cast<AttendDenseStorage<Config>*>(memory);
  ptx::griddepcontrol_wait();
  if (threadIdx.x == 0) storage.block = dense_block<Config>(p);
  __syncthreads();
  load_queries<Config>(p, storage);
  SoftmaxRows rows;
  typename Tile::Output o;
  clear<Tile>(rows, o);
#pragma unroll 1
  for (int window = storage.block.begin; window < storage.block.end; window += Config::kWindow) {
    build_mask(p, storage, window);
    __syncthreads();
    attend_window(p, storage, window, rows, o);
  }
  ptx::cp_async_wait_all();
  __syncthreads();  // Q is here even without a window; from here on a warp has its rows to itself
  const uint32_t broken = end_rows(p, storage, rows, o);
  __syncwarp();
  write_rows(p, storage, broken);
  if (broken) write_again(p, storage, broken);
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, most elements of a row, keys of a tile). A launch takes the narrowest.
#define RESONA_ATTEND_DENSE_INSTANCES(X) \
  X(Half, 64, 64)                        \
  X(Half, 128, 64)                       \
  X(Half, 256, 32)                       \
  X(BFloat16, 64, 64)                    \
  X(BFloat16, 128, 64)                   \
  X(BFloat16, 256, 32)

}  // namespace resona::cuda
