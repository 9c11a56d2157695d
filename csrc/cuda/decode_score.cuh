// The canonical scores of one query with many rows, chunks or centroids, for a decode step.
//
//   for each tile of 128 (fp32: 64) rows of a range
//     for each slice of 128 elements                               one, unless E > 128
//       rows -> shared memory           16-byte asynchronous copies, all of the tile in flight
//       8 lanes per row add the products                           fp64, canonical order
//     dot / norm -> key                 score and number of the row as one number (search_key.cuh)
//   the best of the range -> memory     or all of its keys, if many are wanted
//
// A query alone has nothing to share a row with: tensor cores would idle, and the filter of search.cuh with
// its certificate costs more than scoring canonically at once. So the result is exact as it stands.
//
// Bytes: 32 KB are staged at a time and several blocks fit on a multiprocessor, so the memory's latency is
// covered. Arithmetic: E fp64 FMA per row and as many conversions, on devices with full-rate fp64 below the
// memory time.
#pragma once

#include <cmath>

#include "cuda/attend_params.cuh"
#include "cuda/attend_tile.cuh"
#include "cuda/canonical_warp.cuh"
#include "cuda/decode_select.cuh"
#include "cuda/ptx/cp_async.cuh"

namespace resona::cuda {

// What is scored, and where the keys go. A group is a (sequence, retrieval head).
template <class T>
struct DecodeScoreParams {
  HeadRows<const T> query;     // [B, 1, R, E]
  HeadRows<const T> rows;      // [B, n, R, E]
  int64_t heads, dim;          // R, E
  int64_t range, lists, kept;  // as in CudaDecodeRanges
  bool vector;                 // rows are rows of 16 bytes
  uint64_t* keys;              // [B, R, lists, kept]
};

template <class T>
struct DecodeScoreConfig {
  using Element = T;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kGroups = kThreads / canonical::kLanes;  // rows that are worked on at once
  static constexpr int kPerGroup = 16 / sizeof(T);
  static constexpr int kTile = kGroups * kPerGroup;  // rows
  static constexpr int kSlice = 128;
  // Rows begin 4 banks apart (fp32: 8), so 8 lanes on each of 4 rows read without conflict.
  static constexpr int kPitch = kSlice + 8;
  static constexpr int kMostRange = 1024;
};

template <class Config>
struct DecodeScoreStorage {
  alignas(16) typename Config::Element rows[Config::kTile][Config::kPitch];
  double query[Config::kSlice];
  uint64_t keys[Config::kMostRange];
  SelectStorage<Config::kWarps> select;
};

// One range of a group.
struct DecodeRange {
  int64_t batch, head, list;
  int64_t count;  // of its rows
};

// `count` elements from `slice` on of the rows of a tile, of which `left` exist; the rest of a 16-byte piece,
// and rows that do not exist, are zeros. number(i) is the row in place i of the tile.
template <class Config, class T, class Number>
__device__ __forceinline__ void stage_slice(const DecodeScoreParams<T>& p, const DecodeRange& r,
                                            int64_t slice, int count, int64_t left, const Number& number,
                                            DecodeScoreStorage<Config>& storage) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = Config::kSlice / kPiece;
  constexpr int kAtOnce = Config::kThreads / kPieces;
  const T* rows = p.rows.at(r.batch, 0, r.head) + slice;
  const int first = threadIdx.x % kPieces * kPiece;
  if (first < count)
    for (int i = threadIdx.x / kPieces; i < Config::kTile; i += kAtOnce) {
      const bool exists = i < left;
      const T* from = rows + (exists ? number(i) : 0) * p.rows.token_stride;
      load_piece(reinterpret_cast<unsigned char*>(&storage.rows[i][first]), from, first, count, exists,
                 p.vector);
    }
  if (static_cast<int>(threadIdx.x) < count)
    storage.query[threadIdx.x] =
        static_cast<double>(to_float(p.query.at(r.batch, 0, r.head)[slice + threadIdx.x]));
  ptx::cp_async_wait_all();
}

// Of rows group, group + kGroups, ... of the tile; `squares` of the query.
template <class Config>
__device__ __forceinline__ void add_slice(const DecodeScoreStorage<Config>& storage, int count,
                                          double (&products)[Config::kPerGroup], double& squares) {
  const int group = threadIdx.x / canonical::kLanes;
#pragma unroll 2
  for (int e = threadIdx.x % canonical::kLanes; e < count; e += canonical::kLanes) {
    const double q = storage.query[e];
    squares += q * q;
#pragma unroll
    for (int i = 0; i < Config::kPerGroup; ++i)
      products[i] += q * static_cast<double>(to_float(storage.rows[group + i * Config::kGroups][e]));
  }
}

// Keys of up to kTile rows.
template <class Config, class T, class Number>
__device__ __forceinline__ void score_tile(const DecodeScoreParams<T>& p, const DecodeRange& r, int64_t left,
                                           const Number& number, uint64_t* keys,
                                           DecodeScoreStorage<Config>& storage) {
  const int group = threadIdx.x / canonical::kLanes;
  double products[Config::kPerGroup] = {}, squares = 0;
  for (int64_t slice = 0; slice < p.dim; slice += Config::kSlice) {
    const int64_t rest = p.dim - slice;
    const int elements = rest < Config::kSlice ? static_cast<int>(rest) : Config::kSlice;
    stage_slice<Config>(p, r, slice, elements, left, number, storage);
    __syncthreads();
    add_slice<Config>(storage, elements, products, squares);
    __syncthreads();  // read before the next slice or tile replaces it
  }
  const double norm = std::sqrt(fold_lanes(squares));
#pragma unroll
  for (int i = 0; i < Config::kPerGroup; ++i) {
    const float score = canonical::score<float>(fold_lanes(products[i]), norm);
    const int row = group + i * Config::kGroups;
    if (threadIdx.x % canonical::kLanes == 0 && row < left)
      keys[row] = search_key(score, static_cast<int>(number(row)));
  }
}

// Passes on `kept` keys of the range, 0 where it has no more. number(i) is the row in place i of the range;
// it may be read from storage.keys[i], which its key replaces.
template <class Config, class T, class Number>
__device__ __forceinline__ void score_range(const DecodeScoreParams<T>& p, const DecodeRange& r,
                                            const Number& number, DecodeScoreStorage<Config>& storage) {
  for (int64_t tile = 0; tile < r.count; tile += Config::kTile)
    score_tile<Config>(
        p, r, r.count - tile, [&number, tile](int i) { return number(tile + i); }, storage.keys + tile,
        storage);
  __syncthreads();  // all keys are written
  uint64_t* to = p.keys + ((r.batch * p.heads + r.head) * p.lists + r.list) * p.kept;
  int64_t written = r.count;
  if (p.kept < p.range)
    written = select_best(storage.keys, r.count, p.kept, storage.select,
                          [to](int64_t slot, uint64_t key) { to[slot] = key; });
  else
    for (int64_t i = threadIdx.x; i < r.count; i += Config::kThreads) to[i] = storage.keys[i];
  for (int64_t i = written + threadIdx.x; i < p.kept; i += Config::kThreads) to[i] = 0;
}

}  // namespace resona::cuda
