// Around search_kernel:
//
//   search_norms_kernel    a warp per 64 chunks: the largest norm among them. Before, for chunks of any norm
//   search_exact_kernel    instead, for k above what bags of candidates hold: a block per row scores every
//                          eligible chunk canonically -> keys in global memory; then k times the largest key
//                          below the last one
//
// search_norms_kernel also clears the tickets. Bytes: chunks once for the norms; an exact row reads
// all its chunks once and its keys k times, from the L2.
#pragma once

#include "cuda/canonical_lane.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/search_rows.cuh"

namespace resona::cuda {

// ---- norms

template <class T>
struct SearchNormsParams {
  SearchOperand<T> chunk;
  int64_t batch, heads, chunks, dim;  // B, R, C, E
  float* norms;                       // [B, R, ceil(C / 64)]
  uint32_t* tickets;                  // [ticket_count], of search_kernel: cleared
  int64_t ticket_count;

  __device__ __forceinline__ int64_t steps() const { return (chunks + kSearchChunks - 1) / kSearchChunks; }
};

struct SearchNormsConfig {
  static constexpr int kMinBlocks = 6;
  static constexpr int kThreads = 128;
  static constexpr int kRegisterCap = 80;
};

template <class T>
__global__ void __launch_bounds__(SearchNormsConfig::kThreads, SearchNormsConfig::kMinBlocks)
    search_norms_kernel(SearchNormsParams<T> p) {
  ptx::griddepcontrol_wait();
  const int lane = threadIdx.x % kWarpSize;
  if (blockIdx.x == 0)
    for (int64_t i = threadIdx.x; i < p.ticket_count; i += SearchNormsConfig::kThreads) p.tickets[i] = 0;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (SearchNormsConfig::kThreads / kWarpSize);
  for (int64_t item =
           (static_cast<int64_t>(blockIdx.x) * SearchNormsConfig::kThreads + threadIdx.x) / kWarpSize;
       item < p.batch * p.heads * p.steps(); item += warps) {
    const int64_t group = item / p.steps(), first = item % p.steps() * kSearchChunks;
    double largest = 0;
    for (int i = lane; i < kSearchChunks; i += kWarpSize) {
      const int64_t chunk = first + i < p.chunks ? first + i : p.chunks - 1;
      const T* row = p.chunk.at(group / p.heads, chunk, group % p.heads);
      const double square = canonical_product(row, row, p.dim, p.chunk.vector);
      if (!(square <= largest)) largest = square == square ? square : static_cast<double>(-kLowest);
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
      largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    if (lane == 0) p.norms[item] = static_cast<float>(std::sqrt(largest));
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- exact

template <class T>
struct SearchExactParams {
  SearchRows rows;
  SearchOperand<T> query, chunk;
  SearchResults results;
  uint64_t* keys;  // [blocks, C]
};

struct SearchExactConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kMinBlocks = 2;
  static constexpr int kRegisterCap = 128;
};

struct SearchExactStorage {
  uint64_t largest[SearchExactConfig::kWarps];
};

// The largest of the block's keys below `bound`, for every thread. Each thread looks at those that it wrote.
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
    search_exact_kernel(SearchExactParams<T> p) {
  RESONA_SHARED(SearchExactStorage, storage);
  ptx::griddepcontrol_wait();
  uint64_t* keys = p.keys + blockIdx.x * p.rows.chunks;
  const bool vector = p.query.vector && p.chunk.vector;
  for (int64_t i = blockIdx.x; i < p.rows.tiles * kSearchRows; i += gridDim.x) {
    const SearchTileId id = search_tile_id(p.rows, p.rows.first_tile + i / kSearchRows);
    const int row = static_cast<int>(i % kSearchRows);
    if (id.query + row >= p.rows.queries) continue;
    const QueryPlace place = p.rows.place(id.query + row);
    const T* query = p.query.at(id.batch, id.query + row, id.head);
    const double norm = std::sqrt(canonical_product(query, query, p.rows.dim, vector));
    const int eligible = static_cast<int>(place.eligible);
    for (int c = threadIdx.x; c < eligible; c += SearchExactConfig::kThreads) {
      const T* chunk = p.chunk.at(id.batch, place.chunk_begin + c, id.head);
      const double dot = canonical_product(query, chunk, p.rows.dim, vector);
      keys[c] = search_key(canonical::score<float>(dot, norm), c);
    }
    const int64_t slots = p.results.slots_of(p.rows, id, row);
    uint64_t key = kAboveEveryKey;
    for (int64_t slot = 0; slot < p.results.top_k; ++slot) {
      if (key != 0) key = block_largest_below(keys, eligible, key, storage);
      if (threadIdx.x == 0) write_slot(p.results, slots + slot, key);
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
