// From candidates to results: canonical scores (common/canonical.h), the best k, and the proof that nothing
// better was passed over. See search.cuh for the sequence.
//
//   search_norms_kernel    a warp per 64 chunks: the largest norm among them; zeroes the count of rows that
//                          are uncertain
//   search_refine_kernel   a warp per row: 8 lanes score a candidate, four at a time -> keys in shared memory
//                          k times the largest key below the last one -> indices, scores; is the row certain?
//   search_exact_kernel    a block per uncertain row: every eligible chunk scored -> keys in global memory;
//                          the same selection. Without a list it takes all rows, for problems without
//                          candidates.
//
// Certain means: all eligible chunks were candidates, or the cutoff, which no other chunk's quick product
// exceeds, lies below what common/filter.h allows to reach the k-th score.
//
// Bytes: chunks once for the norms; candidates * E per row, from the L2; an exact row reads all its chunks.
#pragma once

#include "common/filter.h"
#include "cuda/canonical_warp.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/search.cuh"
#include "cuda/search_key.cuh"

namespace resona::cuda {

// Lane lane % 8 of eight adds the canonical products of its elements of two rows; fold_lanes ends the sum.
template <class T>
__device__ __forceinline__ double add_products(const T* a, const T* b, int64_t dim) {
  double partial = 0;
#pragma unroll 4
  for (int64_t e = threadIdx.x % canonical::kLanes; e < dim; e += canonical::kLanes)
    partial += static_cast<double>(to_float(a[e])) * static_cast<double>(to_float(b[e]));
  return partial;
}

// ---- norms

template <class T>
struct SearchNormsParams {
  SearchOperand<T> chunk;
  int64_t batch, heads, chunks, dim;  // B, R, C, E
  float* norms;                       // [B, R, ceil(C / 64)]

  __device__ __forceinline__ int64_t steps() const { return (chunks + kSearchChunks - 1) / kSearchChunks; }
};

struct SearchNormsConfig {
  static constexpr int kThreads = 128;
  static constexpr int kRegisterCap = 64;
};

template <class T>
__global__ void __launch_bounds__(SearchNormsConfig::kThreads) search_norms_kernel(SearchNormsParams<T> p) {
  ptx::griddepcontrol_wait();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (SearchNormsConfig::kThreads / kWarpSize);
  for (int64_t item =
           (static_cast<int64_t>(blockIdx.x) * SearchNormsConfig::kThreads + threadIdx.x) / kWarpSize;
       item < p.batch * p.heads * p.steps(); item += warps) {
    const int64_t group = item / p.steps(), first = item % p.steps() * kSearchChunks;
    double largest = 0;
    for (int i = lane / canonical::kLanes; i < kSearchChunks; i += kWarpSize / canonical::kLanes) {
      const int64_t chunk = first + i < p.chunks ? first + i : p.chunks - 1;
      const T* row = p.chunk.at(group / p.heads, chunk, group % p.heads);
      const double square = fold_lanes(add_products(row, row, p.dim));
      if (!(square <= largest)) largest = square == square ? square : static_cast<double>(-kLowest);
    }
    largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, 8));
    largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, 16));
    if (lane == 0) p.norms[item] = static_cast<float>(std::sqrt(largest));
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- rows

template <class T>
struct SearchResultParams {
  SearchRows rows;
  SearchOperand<T> query, chunk;
  const int32_t* candidates;  // as SearchParams wrote them: `groups` of `group_candidates` per row
  const float* cutoffs;
  const float* norms;  // null: unit chunks
  int groups, splits, group_candidates;
  FilterError error;   // of the quick products
  uint32_t* count;     // uncertain rows
  int64_t* uncertain;  // [tiles * 128], as rows of the launch; null: take all
  uint64_t* keys;      // [blocks of search_exact_kernel, C]
  int64_t top_k;
  int32_t* indices;  // [B, T, R, k]
  float* scores;     // [B, T, R, k]
};

// One row of the launch.
template <class T>
struct SearchRow {
  QueryPlace place;
  const T* query;
  const T* chunks;  // chunk 0 of its sequence
  int64_t slots;    // where its results go
  int64_t group;    // batch entry and head
  double norm;
  bool exists;
};

// Every group of eight lanes comes to the same norm.
template <class T>
__device__ __forceinline__ SearchRow<T> search_row(const SearchResultParams<T>& p, int64_t row) {
  const SearchTileId id = search_tile_id(p.rows, p.rows.first_tile + row / kSearchRows);
  const int64_t query = id.query + row % kSearchRows;
  SearchRow<T> r;
  r.exists = query < p.rows.queries;
  r.place = p.rows.place(query);
  r.query = p.query.at(id.batch, r.exists ? query : 0, id.head);
  r.chunks = p.chunk.at(id.batch, r.place.chunk_begin, id.head);
  r.slots = ((id.batch * p.rows.queries + query) * p.rows.heads + id.head) * p.top_k;
  r.group = id.batch * p.rows.heads + id.head;
  r.norm = std::sqrt(fold_lanes(add_products(r.query, r.query, p.rows.dim)));
  return r;
}

template <class T>
__device__ __forceinline__ uint64_t score_chunk(const SearchResultParams<T>& p, const SearchRow<T>& r,
                                                int chunk) {
  double partial = 0;
  if (chunk >= 0) partial = add_products(r.query, r.chunks + chunk * p.chunk.row_stride, p.rows.dim);
  const double dot = fold_lanes(partial);
  return chunk < 0 ? 0 : search_key(canonical::score<float>(dot, r.norm), chunk);
}

template <class T>
__device__ __forceinline__ void write_slot(const SearchResultParams<T>& p, const SearchRow<T>& r,
                                           int64_t slot, uint64_t key) {
  p.indices[r.slots + slot] = key == 0 ? -1 : chunk_of_key(key);
  p.scores[r.slots + slot] = key == 0 ? kLowest : score_of_key(key);
}

// ---- refine

struct SearchRefineConfig {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kMostCandidates = 256;  // of a row, all groups together
  static constexpr int kRegisterCap = 80;
};

struct SearchRefineStorage {
  uint64_t keys[SearchRefineConfig::kWarps][SearchRefineConfig::kMostCandidates];
};

template <class T>
__device__ __forceinline__ double largest_norm(const SearchResultParams<T>& p, const SearchRow<T>& r) {
  if (!p.norms) return kLargestUnitNorm;
  const int64_t steps = (p.rows.chunks + kSearchChunks - 1) / kSearchChunks;
  const int64_t first = r.place.chunk_begin / kSearchChunks;
  const int64_t last = (r.place.chunk_begin + r.place.eligible - 1) / kSearchChunks;
  float largest = 0;
  for (int64_t i = first + threadIdx.x % kWarpSize; i <= last; i += kWarpSize)
    largest = fmaxf(largest, p.norms[r.group * steps + i]);
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  return largest;
}

// No quick product of a chunk that is not a candidate exceeds this.
template <class T>
__device__ __forceinline__ float row_cutoff(const SearchResultParams<T>& p, int64_t row) {
  float cutoff = kLowest;
  for (int i = p.groups - p.splits; i < p.groups; ++i) cutoff = fmaxf(cutoff, p.cutoffs[row * p.groups + i]);
  return cutoff;
}

template <class T>
__device__ __forceinline__ bool is_certain(const SearchResultParams<T>& p, const SearchRow<T>& r,
                                           int64_t found, float cutoff, uint64_t kth_key, double largest) {
  if (!in_filter_range(r.norm, largest, p.rows.dim)) return false;
  // Nothing was passed over but products of NaN, which enter no bag: they rank last, yet fill slots.
  if (cutoff == kLowest) return found == r.place.eligible || kth_key != 0;
  const float kth_score = score_of_key(kth_key);
  return kth_key != 0 && static_cast<double>(cutoff) < filter_limit(kth_score, r.norm, largest, p.error);
}

template <class T>
__global__ void __launch_bounds__(SearchRefineConfig::kThreads)
    search_refine_kernel(SearchResultParams<T> p) {
  RESONA_SHARED(SearchRefineStorage, storage);
  ptx::griddepcontrol_wait();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64_t* keys = storage.keys[warp];
  const int count = p.groups * p.group_candidates;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * SearchRefineConfig::kWarps + warp;
  const SearchRow<T> r = search_row(p, row);
  if (r.exists) {
    for (int first = 0; first < count; first += kWarpSize / canonical::kLanes) {
      const int i = first + lane / canonical::kLanes;
      const uint64_t key = score_chunk(p, r, i < count ? p.candidates[row * count + i] : -1);
      if (lane % canonical::kLanes == 0 && i < count) keys[i] = key;
    }
    __syncwarp();
    // A query of norm zero scores 0 with every chunk: the first ones.
    uint64_t key = kAboveEveryKey;
    int64_t found = 0;
    for (int64_t slot = 0; slot < p.top_k; ++slot) {
      if (r.norm == 0)
        key = slot < r.place.eligible ? search_key(0, static_cast<int>(slot)) : 0;
      else if (key != 0)
        key = warp_max(largest_below(keys, count, lane, kWarpSize, key));
      if (key != 0) ++found;
      if (lane == 0) write_slot(p, r, slot, key);
    }
    const double largest = r.place.eligible > 0 ? largest_norm(p, r) : 0;
    const bool trivial = r.norm == 0 || r.place.eligible == 0;
    if (lane == 0 && !trivial && !is_certain(p, r, found, row_cutoff(p, row), key, largest))
      p.uncertain[ptx::atom_add_relaxed_gpu(p.count, 1)] = row;
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- exact

struct SearchExactConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kMinBlocks = 3;
  static constexpr int kRegisterCap = 80;
};

struct SearchExactStorage {
  uint64_t largest[SearchExactConfig::kWarps];
};

// The largest of the block's keys below `bound`, for every thread.
__device__ __forceinline__ uint64_t block_largest_below(const uint64_t* keys, int count, uint64_t bound,
                                                        SearchExactStorage& storage) {
  const uint64_t mine = warp_max(largest_below(keys, count, threadIdx.x, SearchExactConfig::kThreads, bound));
  if (threadIdx.x % kWarpSize == 0) storage.largest[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  uint64_t largest = 0;
#pragma unroll
  for (int i = 0; i < SearchExactConfig::kWarps; ++i)
    largest = storage.largest[i] > largest ? storage.largest[i] : largest;
  __syncthreads();  // read before the next round replaces it
  return largest;
}

template <class T>
__global__ void __launch_bounds__(SearchExactConfig::kThreads, SearchExactConfig::kMinBlocks)
    search_exact_kernel(SearchResultParams<T> p) {
  RESONA_SHARED(SearchExactStorage, storage);
  ptx::griddepcontrol_wait();
  uint64_t* keys = p.keys + blockIdx.x * p.rows.chunks;
  const int64_t rows = p.uncertain ? *p.count : p.rows.tiles * kSearchRows;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const SearchRow<T> r = search_row(p, p.uncertain ? p.uncertain[i] : i);
    if (!r.exists) continue;
    const int eligible = static_cast<int>(r.place.eligible);
    constexpr int kAtOnce = SearchExactConfig::kThreads / canonical::kLanes;
    for (int first = 0; first < eligible; first += kAtOnce) {
      const int chunk = first + static_cast<int>(threadIdx.x) / canonical::kLanes;
      const uint64_t key = score_chunk(p, r, chunk < eligible ? chunk : -1);
      if (threadIdx.x % canonical::kLanes == 0 && chunk < eligible) keys[chunk] = key;
    }
    __syncthreads();
    uint64_t key = kAboveEveryKey;
    for (int64_t slot = 0; slot < p.top_k; ++slot) {
      if (key != 0) key = block_largest_below(keys, eligible, key, storage);
      if (threadIdx.x == 0) write_slot(p, r, slot, key);
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
