// The end of search_kernel: from the candidates of a block's 128 rows to their results.
//
//   a warp finishes its 16 rows
//     a lane per candidate: canonical score -> key in shared memory
//     slot of a candidate = how many keys of its row are larger        distinct keys: every slot once
//     a lane per row: is it certain? If not, into the block's list
//   the block works off that list, a row at a time
//     a thread per chunk, 256 at a time: canonical score -> key
//     keys above the k-th so far join the at most k that are kept, ranked the same way
//   a histogram of the results, if the index of attention wants it
//
// Certain means: all eligible chunks were candidates, or the cutoff, which no other chunk's quick product
// exceeds, lies below what common/filter.h allows to reach the k-th score.
//
// Shared memory is that of the stages, which nobody needs any more. Bytes: candidates * E per row, from the
// L2; an uncertain row reads all its chunks.
#pragma once

#include "cuda/canonical_lane.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/search_rows.cuh"

namespace resona::cuda {

constexpr int kSearchWarps = kSearchThreads / kWarpSize;
constexpr int kMostCandidates = 256;            // of a row, all groups together
constexpr int kWarpKeys = 2 * kMostCandidates;  // rows that a warp finishes at once: as many as fit
constexpr int kMostKept = kSearchThreads;       // of k, where there are candidates at all

constexpr int kMostCounted = 4096;  // chunk rows of a batch entry

// Takes the place of the stages.
template <int kCandidates>
struct SearchStorage {
  union {
    uint64_t keys[kSearchWarps][kWarpKeys];
    uint64_t kept[kMostKept + kSearchThreads];  // of an uncertain row: the best, and those that join them
    uint32_t counts[kMostCounted];              // of each chunk row: slots that name it
  };
  double norm[kSearchRows];
  uint64_t kth[kSearchRows];
  int32_t candidates[kSearchRows][kCandidates];  // of one pass and split
  float cutoff[kSearchRows];
  int begin[kSearchRows], eligible[kSearchRows];
  int found[kSearchRows];
  float largest[kSearchWarps];
  uint32_t uncertain_rows, joined;
  uint32_t uncertain[kSearchRows];
  bool is_last;
  static constexpr bool kKeepsResults = false;
};

// How many keys are larger.
__device__ __forceinline__ int rank_of(uint64_t key, const uint64_t* keys, int count) {
  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) rank += keys[i] > key;
  return rank;
}

// A block on its tile of rows.
template <class T, class Storage>
struct SearchFinish {
  const SearchParams<T>& p;
  const SearchTileId& id;
  Storage& storage;
  int tile;  // of the launch

  __device__ __forceinline__ int existing_rows() const {
    const int64_t left = p.rows.queries - id.query;
    return left < kSearchRows ? static_cast<int>(left) : kSearchRows;
  }

  __device__ __forceinline__ const T* query(int row) const {
    return p.query.at(id.batch, id.query + row, id.head);
  }

  __device__ __forceinline__ double product(const T* a, const T* b) const {
    return canonical_product(a, b, p.rows.dim, p.query.vector && p.chunk.vector);
  }

  __device__ __forceinline__ uint64_t key_of(int row, int chunk) const {
    const T* from = p.chunk.at(id.batch, storage.begin[row] + chunk, id.head);
    return search_key(canonical::score<float>(product(query(row), from), storage.norm[row]), chunk);
  }

  __device__ __forceinline__ int candidate(int row, int i, int count) const {
    if (row >= existing_rows()) return -1;
    if (p.groups() == 1) return storage.candidates[row][i];
    return p.candidates[(static_cast<int64_t>(tile) * kSearchRows + row) * count + i];
  }

  // No quick product of a chunk that is not a candidate exceeds this.
  __device__ __forceinline__ float cutoff(int row) const {
    if (p.groups() == 1) return storage.cutoff[row];
    const float* of_row = p.cutoffs + (static_cast<int64_t>(tile) * kSearchRows + row) * p.splits;
    float cutoff = kLowest;
    for (int i = 0; i < p.splits; ++i) cutoff = fmaxf(cutoff, of_row[i]);
    return cutoff;
  }

  __device__ __forceinline__ double largest_norm() const {
    if (!p.norms) return kLargestUnitNorm;
    float largest = 0;
    for (int i = 0; i < kSearchWarps; ++i) largest = fmaxf(largest, storage.largest[i]);
    return largest;
  }

  __device__ __forceinline__ bool is_certain(int row) const {
    const double norm = storage.norm[row], largest = largest_norm();
    if (norm == 0 || storage.eligible[row] == 0) return true;
    if (!in_filter_range(norm, largest, p.rows.dim)) return false;
    const uint64_t kth = storage.kth[row];
    const float bound = cutoff(row);
    // Nothing was passed over but products of NaN, which enter no bag: they rank last, yet fill slots.
    if (bound == kLowest) return kth != 0 || storage.found[row] == storage.eligible[row];
    return kth != 0 && static_cast<double>(bound) < filter_limit(score_of_key(kth), norm, largest, p.error);
  }

  // Key 0: an unused slot.
  __device__ __forceinline__ void put(int row, int64_t slot, uint64_t key) const {
    const int64_t top_k = p.results.top_k;
    write_slot(p.results, p.results.slots_of(p.rows, id, row) + slot, key);
    if constexpr (Storage::kKeepsResults) write_slot(storage.results(top_k), row * top_k + slot, key);
  }

  // Rows [first, first + rows) of the block, by one warp.
  __device__ __forceinline__ void finish_rows(int first, int rows, int count, uint64_t* keys) const {
    const int lane = threadIdx.x % kWarpSize;
    for (int i = lane; i < rows * count; i += kWarpSize) {
      const int row = first + i / count, chunk = candidate(row, i % count, count);
      keys[i] = chunk < 0 ? 0 : key_of(row, chunk);
    }
    __syncwarp();  // keys are there
    for (int i = lane; i < rows * count; i += kWarpSize) {
      const int of_row = i / count, row = first + of_row;
      const uint64_t key = keys[i];
      if (key == 0 || storage.norm[row] == 0) continue;
      const int rank = rank_of(key, keys + of_row * count, count);
      if (rank < p.results.top_k) put(row, rank, key);
      if (rank == p.results.top_k - 1) storage.kth[row] = key;
    }
    if (lane < rows) {
      int found = 0;
      for (int i = 0; i < count; ++i) found += keys[lane * count + i] != 0;
      storage.found[first + lane] = found;
    }
    __syncwarp();  // kth and found are there
    for (int row = first; row < first + rows && row < existing_rows(); ++row) {
      // A query of norm zero scores 0 with every chunk: the first ones.
      const bool zero = storage.norm[row] == 0;
      for (int64_t slot = (zero ? 0 : storage.found[row]) + lane; slot < p.results.top_k; slot += kWarpSize)
        put(row, slot, zero && slot < storage.eligible[row] ? search_key(0, static_cast<int>(slot)) : 0);
    }
    const int row = first + lane;
    if (lane < rows && row < existing_rows() && !is_certain(row))
      storage.uncertain[ptx::atom_add_relaxed_cta(&storage.uncertain_rows, 1)] = static_cast<uint32_t>(row);
    __syncwarp();  // keys are read before the next rows replace them
  }

  // Every eligible chunk, by the whole block.
  __device__ __forceinline__ void scan_row(int row) const {
    const int thread = threadIdx.x, eligible = storage.eligible[row];
    const int most = p.results.top_k < eligible ? static_cast<int>(p.results.top_k) : eligible;
    int kept = 0;
    uint64_t bound = 0;
    for (int first = 0; first < eligible; first += kSearchThreads) {
      const uint64_t key = first + thread < eligible ? key_of(row, first + thread) : 0;
      if (key > bound) storage.kept[kept + ptx::atom_add_relaxed_cta(&storage.joined, 1)] = key;
      const int count = kept + __syncthreads_count(key > bound);
      if (count == kept) continue;
      uint64_t mine[2] = {};
      int rank[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int i = thread + j * kSearchThreads;
        if (i >= count) continue;
        mine[j] = storage.kept[i], rank[j] = rank_of(mine[j], storage.kept, count);
      }
      __syncthreads();  // all are ranked before any is put into its place
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (mine[j] != 0 && rank[j] < most) storage.kept[rank[j]] = mine[j];
      if (thread == 0) storage.joined = 0;
      __syncthreads();
      kept = count < most ? count : most;
      if (kept == most) bound = storage.kept[most - 1];
    }
    for (int64_t slot = thread; slot < p.results.top_k; slot += kSearchThreads)
      put(row, slot, slot < kept ? storage.kept[slot] : 0);
    __syncthreads();  // written before the next row's keys replace them
  }

  // How often the block's results name each chunk row, for the index of whoever attends to them.
  __device__ __forceinline__ void count_chunks() const {
    for (int i = threadIdx.x; i < p.count_pitch; i += kSearchThreads) storage.counts[i] = 0;
    __syncthreads();  // results are written, counts cleared
    const int top_k = static_cast<int>(p.results.top_k), slots = existing_rows() * top_k;
    for (int i = threadIdx.x; i < slots; i += kSearchThreads) {
      const int row = i / top_k;
      const int index = p.results.indices[p.results.slots_of(p.rows, id, row) + i % top_k];
      if (index >= 0) ptx::atom_add_relaxed_cta(&storage.counts[storage.begin[row] + index], 1);
    }
    __syncthreads();  // all are counted
    uint16_t* to = p.tile_counts + (p.rows.first_tile + tile) * p.count_pitch;
    for (int i = threadIdx.x; i < p.count_pitch; i += kSearchThreads)
      to[i] = static_cast<uint16_t>(storage.counts[i]);
  }

  // All threads; `storage` holds what the lanes of each row have left there. A call, so that what it needs
  // takes no register from the loop before: inlined, sm_120 spilled up to 40 bytes.
  __device__ __noinline__ void run() const {
    const int lane = threadIdx.x % kWarpSize, first = threadIdx.x / kWarpSize * kWarpRows;
    const int own = first + lane;
    if (lane < kWarpRows) {
      storage.kth[own] = 0;
      storage.norm[own] = own < existing_rows() ? std::sqrt(product(query(own), query(own))) : 0;
    }
    __syncwarp();
    const int count = p.groups() * static_cast<int>(sizeof(storage.candidates[0]) / sizeof(int32_t));
    const int fit = kWarpKeys / count, at_once = fit < kWarpRows ? fit : kWarpRows;
    for (int i = 0; i < kWarpRows; i += at_once)
      finish_rows(first + i, kWarpRows - i < at_once ? kWarpRows - i : at_once, count,
                  storage.keys[threadIdx.x / kWarpSize]);
    __syncthreads();  // the list is complete, and the keys make way
    const int uncertain = static_cast<int>(storage.uncertain_rows);
    for (int i = 0; i < uncertain; ++i) scan_row(static_cast<int>(storage.uncertain[i]));
    if (p.tile_counts) count_chunks();
  }
};

}  // namespace resona::cuda
