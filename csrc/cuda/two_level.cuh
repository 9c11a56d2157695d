// Two-level search, the second level: inside the superchunks that a query probes.
//
//   pool_kernel     over chunks: centroids of superchunks            (pool.cuh)
//   search_kernel   over centroids: the m best of each query         (search.cuh)
//   refine_kernel   a warp per query
//     its searched chunks as one range 0, 1, ...: those of superchunk probed[0], probed[1], ..., and of the
//     one that its past ends in 32 of them at a time: a lane per chunk: canonical score -> key
//     (search_key.cuh)
//       keys above the 32nd so far join them, one after the other: the lanes hold the best 32 in order
//     k above 32: again, among the keys below the last
//
// The order of keys is total, so the order in which superchunks are probed decides nothing. Scores are
// canonical at once: the chunks of a query are few, and no other query shares them for sure.
//
// Bytes: (m P + P / 2) E per query and pass from the L2 or L1, a row per lane; E fp64 operations per chunk,
// which cards with few float64 units will feel.
#pragma once

#include "cuda/canonical_lane.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/search_rows.cuh"

namespace resona::cuda {

template <class T>
struct RefineParams {
  SearchRows rows;
  SearchOperand<T> query, chunk;     // of the part
  uint32_t superchunk_size, probes;  // P, m; P (m + 1) is below 2^32
  const int32_t* probed;             // [B, T, R, m] of the part: superchunks of the query's sequence, or -1
  // Of the results: between the queries, and the batch entries, of the part.
  int64_t query_slots, batch_slots;
  SearchResults results;
};

struct RefineConfig {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kMinBlocks = 4;
  static constexpr int kRegisterCap = 128;
};

// The best 32 keys that a warp has met, in order: lane i holds the i-th, 0 where there are fewer.
__device__ __forceinline__ void join(uint64_t& held, uint64_t key) {
  const int lane = threadIdx.x % kWarpSize;
  for (;;) {
    const uint64_t last = __shfl_sync(kAllLanes, held, kWarpSize - 1);
    const unsigned entering = __ballot_sync(kAllLanes, key > last);
    if (entering == 0) return;
    const int from = __ffs(static_cast<int>(entering)) - 1;
    const uint64_t newcomer = __shfl_sync(kAllLanes, key, from);
    const int slot = __popc(__ballot_sync(kAllLanes, held > newcomer));
    const uint64_t above = __shfl_up_sync(kAllLanes, held, 1);
    if (lane >= slot) held = lane == slot ? newcomer : above;
    if (lane == from) key = 0;
  }
}

// What one warp searches for its query.
template <class T>
struct RefineRow {
  const RefineParams<T>& p;
  int64_t batch, head;
  int64_t chunk_begin;
  uint32_t eligible;
  const T* query;
  double norm;
  const int32_t* probed;
  bool vector;

  // The key of the i-th searched chunk.
  __device__ __forceinline__ uint64_t key_of(uint32_t i) const {
    const uint32_t slot = i / p.superchunk_size, open = eligible / p.superchunk_size;
    const int superchunk = slot < p.probes ? probed[slot] : static_cast<int>(open);
    // Of a query with fewer superchunks, or with wrong cu_seqlens.
    if (superchunk < 0 || (slot < p.probes && static_cast<uint32_t>(superchunk) >= open)) return 0;
    const uint32_t chunk = superchunk * p.superchunk_size + i % p.superchunk_size;
    const T* row = p.chunk.at(batch, chunk_begin + chunk, head);
    const double dot = canonical_product(query, row, p.rows.dim, vector);
    return search_key(canonical::score<float>(dot, norm), static_cast<int>(chunk));
  }

  // The best 32 below `bound`.
  __device__ __forceinline__ uint64_t best_below(uint64_t bound) const {
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t searched = p.probes * p.superchunk_size + eligible % p.superchunk_size;
    uint64_t held = 0;
    for (uint32_t first = 0; first < searched; first += kWarpSize) {
      const uint64_t key = first + lane < searched ? key_of(first + lane) : 0;
      join(held, key < bound ? key : 0);
    }
    return held;
  }
};

template <class T>
__global__ void __launch_bounds__(RefineConfig::kThreads, RefineConfig::kMinBlocks)
    refine_kernel(RefineParams<T> p) {
  ptx::griddepcontrol_wait();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t rows = p.rows.batch * p.rows.queries * p.rows.heads;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * RefineConfig::kWarps;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * RefineConfig::kWarps + threadIdx.x / kWarpSize;
  for (int64_t i = warp; i < rows; i += warps) {
    const int64_t head = i % p.rows.heads, at = i / p.rows.heads;
    const int64_t query_row = at % p.rows.queries, batch = at / p.rows.queries;
    const T* query = p.query.at(batch, query_row, head);
    const bool vector = p.query.vector && p.chunk.vector;
    const double norm = std::sqrt(canonical_product(query, query, p.rows.dim, vector));
    const QueryPlace place = p.rows.place(query_row);
    const RefineRow<T> row{p,
                           batch,
                           head,
                           place.chunk_begin,
                           static_cast<uint32_t>(place.eligible),
                           query,
                           norm,
                           p.probed + i * p.probes,
                           vector};
    const int64_t slots = batch * p.batch_slots + query_row * p.query_slots + head * p.results.top_k;
    uint64_t bound = kAboveEveryKey;
    for (int64_t slot = lane; slot - lane < p.results.top_k; slot += kWarpSize) {
      const uint64_t held = bound == 0 ? 0 : row.best_below(bound);
      if (slot < p.results.top_k) write_slot(p.results, slots + slot, held);
      bound = __shfl_sync(kAllLanes, held, kWarpSize - 1);
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
