// The first launch of a decode step: new tokens join the cache, and every chunk that was closed before is
// scored.
//
//   blocks 0 .. B - 1    append a token each (decode_append.cuh); where it goes, for the second launch
//   the others           a range of chunks of one (sequence, retrieval head)
//     for each tile of 128 (fp32: 64) chunks
//       for each slice of 128 elements                               one, unless E > 128
//         rows -> shared memory           16-byte asynchronous copies, all of the tile in flight
//         8 lanes per chunk add the products                         fp64, canonical order
//       dot / norm -> key                 score and chunk as one number (search_key.cuh)
//     the best k of the range -> memory   or all of its keys, if k is large
//
// A query alone has nothing to share a chunk with: tensor cores would idle, and the filter of search.cuh with
// its certificate costs more than scoring canonically at once. So the result is exact as it stands.
//
// The second launch reads what every range passed on. That costs k keys of 8 bytes per range, and saves a
// third launch or a ticket with a kernel to zero it.
//
// Bytes: chunk embeddings before the token once, C E 2 for 16-bit types; a block stages 32 KB at a time and
// several fit on a multiprocessor, so the memory's latency is covered. Arithmetic: C E fp64 FMA and as many
// conversions, on devices with full-rate fp64 below the memory time.
//
// A sequence without room for its token (full, or marked so before) is left alone: its position is -1.
#pragma once

#include "cuda/attend_tile.cuh"
#include "cuda/decode_append.cuh"
#include "cuda/decode_select.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/griddepcontrol.cuh"

namespace resona::cuda {

template <class T>
struct DecodeSearchParams {
  DecodeAppendParams<T> append;
  HeadRows<const T> query, chunks;  // [B, 1, R, E], [B, C, R, E]
  const int32_t* lengths;           // [B], written by the second launch
  int64_t batch, capacity;          // B, M
  int64_t range, lists, kept;       // as in CudaDecodePlan
  bool vector;                      // chunks are rows of 16 bytes
  int32_t* positions;               // [B]
  uint64_t* keys;                   // [B, R, lists, kept]
  uint32_t* tickets;                // [B, tickets_per_batch], zeroed for the second launch
  int64_t tickets_per_batch;
};

template <class T>
struct DecodeSearchConfig {
  using Element = T;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kGroups = kThreads / canonical::kLanes;  // rows that are worked on at once
  static constexpr int kPerGroup = 16 / sizeof(T);
  static constexpr int kTile = kGroups * kPerGroup;  // chunks
  static constexpr int kSlice = 128;
  // Rows begin 4 banks apart (fp32: 8), so 8 lanes on each of 4 rows read without conflict.
  static constexpr int kPitch = kSlice + 8;
  static constexpr int kMostRange = 1024;
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks = 4;
};

template <class Config>
struct DecodeSearchStorage {
  alignas(16) typename Config::Element rows[Config::kTile][Config::kPitch];
  double query[Config::kSlice];
  uint64_t keys[Config::kMostRange];
  SelectStorage<Config::kWarps> select;
};

// Where the new token goes, or -1.
template <class T>
__device__ __forceinline__ int64_t decode_position(const DecodeSearchParams<T>& p, int64_t batch) {
  const int64_t length = p.lengths[batch];
  return length >= 0 && length < p.capacity ? length : -1;
}

// `count` elements of up to kTile rows; the rest of a 16-byte piece, and rows that do not exist, are zeros.
template <class Config, class T>
__device__ __forceinline__ void stage_slice(const DecodeSearchParams<T>& p, const T* query, const T* rows,
                                            int64_t row_count, int count,
                                            DecodeSearchStorage<Config>& storage) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = Config::kSlice / kPiece;
  constexpr int kAtOnce = Config::kThreads / kPieces;
  const int first = threadIdx.x % kPieces * kPiece;
  if (first < count)
    for (int row = threadIdx.x / kPieces; row < Config::kTile; row += kAtOnce) {
      const bool exists = row < row_count;
      const T* from = rows + (exists ? row : 0) * p.chunks.token_stride;
      load_piece(reinterpret_cast<unsigned char*>(&storage.rows[row][first]), from, first, count, exists,
                 p.vector);
    }
  if (static_cast<int>(threadIdx.x) < count)
    storage.query[threadIdx.x] = static_cast<double>(to_float(query[threadIdx.x]));
  ptx::cp_async_wait_all();
}

// Of the chunks group, group + kGroups, ... of the tile; `squares` of the query.
template <class Config>
__device__ __forceinline__ void add_slice(const DecodeSearchStorage<Config>& storage, int count,
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

// Keys of `count` chunks, of which the first is number `first` of its sequence.
template <class Config, class T>
__device__ __forceinline__ void score_tile(const DecodeSearchParams<T>& p, const T* query, const T* rows,
                                           int64_t first, int64_t count, uint64_t* keys,
                                           DecodeSearchStorage<Config>& storage) {
  const int group = threadIdx.x / canonical::kLanes;
  double products[Config::kPerGroup] = {}, squares = 0;
  for (int64_t slice = 0; slice < p.append.dim; slice += Config::kSlice) {
    const int64_t left = p.append.dim - slice;
    const int elements = left < Config::kSlice ? static_cast<int>(left) : Config::kSlice;
    stage_slice<Config>(p, query + slice, rows + slice, count, elements, storage);
    __syncthreads();
    add_slice<Config>(storage, elements, products, squares);
    __syncthreads();  // read before the next slice or tile replaces it
  }
  const double norm = std::sqrt(fold_lanes(squares));
#pragma unroll
  for (int i = 0; i < Config::kPerGroup; ++i) {
    const float score = canonical::score<float>(fold_lanes(products[i]), norm);
    const int row = group + i * Config::kGroups;
    if (threadIdx.x % canonical::kLanes == 0 && row < count)
      keys[row] = search_key(score, static_cast<int>(first + row));
  }
}

// Passes on `kept` keys of the range, 0 where it has no more.
template <class Config, class T>
__device__ __forceinline__ void search_range(const DecodeSearchParams<T>& p, int64_t group, int64_t list,
                                             int64_t eligible, DecodeSearchStorage<Config>& storage) {
  const int64_t batch = group / p.append.heads, head = group % p.append.heads;
  const int64_t first = list * p.range, left = eligible - first;
  const int64_t count = left < p.range ? left : p.range;
  const T* query = p.query.at(batch, 0, head);
  for (int64_t tile = 0; tile < count; tile += Config::kTile) {
    const int64_t rows = count - tile < Config::kTile ? count - tile : Config::kTile;
    score_tile<Config>(p, query, p.chunks.at(batch, first + tile, head), first + tile, rows,
                       storage.keys + tile, storage);
  }
  __syncthreads();  // all keys are written
  uint64_t* to = p.keys + (group * p.lists + list) * p.kept;
  int64_t written = count;
  if (p.kept < p.range)
    written = select_best(storage.keys, count, p.kept, storage.select,
                          [to](int64_t slot, uint64_t key) { to[slot] = key; });
  else
    for (int64_t i = threadIdx.x; i < count; i += Config::kThreads) to[i] = storage.keys[i];
  for (int64_t i = written + threadIdx.x; i < p.kept; i += Config::kThreads) to[i] = 0;
}

template <class T>
__device__ __forceinline__ void begin_sequence(const DecodeSearchParams<T>& p, int64_t batch) {
  const int64_t position = decode_position(p, batch);
  if (threadIdx.x == 0) p.positions[batch] = static_cast<int32_t>(position);
  for (int64_t i = threadIdx.x; i < p.tickets_per_batch; i += blockDim.x)
    p.tickets[batch * p.tickets_per_batch + i] = 0;
  if (position >= 0) append_token(p.append, batch, position);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    decode_search_kernel(DecodeSearchParams<typename Config::Element> p) {
  using Storage = DecodeSearchStorage<Config>;
  RESONA_SHARED(Storage, storage);
  ptx::griddepcontrol_wait();
  if (blockIdx.x < p.batch) {
    begin_sequence(p, blockIdx.x);
  } else {
    const int64_t item = blockIdx.x - p.batch, group = item / p.lists, list = item % p.lists;
    const int64_t position = decode_position(p, group / p.append.heads);
    const int64_t eligible = position < 0 ? 0 : canonical::eligible_chunks(position, p.append.chunk_size);
    if (list * p.range < eligible) search_range<Config>(p, group, list, eligible, storage);
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
