// The search, and attention by the block that did it: one launch for chunks of a few tokens.
//
//   block of 8 warps: 128 queries of one batch entry and retrieval head
//     chunks of their past -> candidates -> results            search.cuh, search_finish.cuh: the very code
//                               -> indices, scores             the outputs
//                               -> shared memory               where the next part finds them
//     a team of 8 or 16 lanes per query and head of the retrieval head, heads innermost
//       k S keys and values, all loads at once -> out, lse     attend_query.cuh: again, so the same bits
//
// A block searches, which is arithmetic, and then gathers, which is memory. In launches of their own these
// come one after the other on the whole device; here two blocks share a multiprocessor, one searching while
// the other gathers, for causality sends them out of step. Rows that were not certain are searched in full
// before their block attends to anything, so they need no path of their own.
//
// Bytes: those of the two kernels, less k (4 + 4) per query and retrieval head read back. For the gathering
// 16 warps share a multiprocessor, as many as in attend_query_kernel: so this pays only where there is a tile
// of queries for each of them, else attention would run on fewer multiprocessors than it could have.
#pragma once

#include "cuda/attend_query.cuh"
#include "cuda/search.cuh"

namespace resona::cuda {

constexpr int kMostAttended = 2;  // of k

template <class T>
struct SearchAttendParams {
  SearchParams<T> search;
  AttendParams<T> attend;
};

// Indices and scores of the block's rows are kept.
template <int kCandidates>
struct SearchAttendStorage : SearchStorage<kCandidates> {
  static constexpr bool kKeepsResults = true;
  int32_t indices[kSearchRows * kMostAttended];  // [row, k]
  float scores[kSearchRows * kMostAttended];

  __device__ __forceinline__ SearchResults results(int64_t top_k) { return {top_k, indices, scores}; }
};

template <class T, int kLanesPerRow>
struct SearchAttendConfig {
  using Element = T;
  using Search = SearchConfig<T, sizeof(T) == 2, 1>;
  using Attend = AttendQueryConfig<T, kLanesPerRow, 1, true>;
  using Storage = SearchAttendStorage<Search::kCandidates>;
  static_assert(kMostAttended < Search::kCandidates, "a candidate to spare");
  static constexpr int kTeams = kSearchThreads / Attend::kLanes;
  static constexpr int kSharedBytes = Search::kSharedBytes;
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks = 2;
};

// The rows of a block, numbered over its queries and, innermost, the heads that share their results.
template <class T>
struct AttendedRows {
  const AttendParams<T>& p;
  const SearchTileId& id;

  __device__ __forceinline__ int heads() const { return p.heads / p.retrieval_heads; }
  __device__ __forceinline__ int count() const {
    const int64_t left = p.queries - id.query;
    return (left < kSearchRows ? static_cast<int>(left) : kSearchRows) * heads();
  }
  __device__ __forceinline__ QueryRow row(int i) const {
    if (i >= count()) return {0, 0, 0, 0, 0};
    const int head = static_cast<int>(id.head) * heads() + i % heads();
    return {static_cast<int>(id.batch), static_cast<int>(id.query) + i / heads(), head / p.group(), head, 1};
  }
};

template <class Config, class T>
__device__ __forceinline__ void attend_to_results(const AttendParams<T>& p, const SearchTileId& id,
                                                  const typename Config::Storage& storage) {
  using Attend = typename Config::Attend;
  const AttendedRows<T> rows{p, id};
  const int team = threadIdx.x / Attend::kLanes, key = threadIdx.x % Attend::kLanes % Attend::kTile;
  for (int first = 0; first < rows.count(); first += Config::kTeams) {
    const QueryRow row = rows.row(first + team);
    QueryKeys keys = query_keys(p, row, key, Attend::kTile);
    keys.indices = storage.indices;
    if (keys.bias) keys.bias = storage.scores;
    keys.first_slot = (first + team) / rows.heads() * p.top_k;
    QueryState<Attend> state;
    attend_listed_keys<Attend>(p, row, keys, state);
    write_query_row<Attend>(p, row, state);
  }
}

template <class Config>
__global__ void __launch_bounds__(kSearchThreads, Config::kMinBlocks)
    search_attend_kernel(const __grid_constant__ SearchAttendParams<typename Config::Element> p) {
  RESONA_DYNAMIC_SHARED(shared);
  RESONA_SHARED(SearchBlock, block);
  using Storage = typename Config::Storage;
  ptx::griddepcontrol_wait();
  if (search_rows<typename Config::Search, Storage>(p.search, block, shared))
    attend_to_results<Config>(p.attend, block.id, *reinterpret_cast<const Storage*>(shared));
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, lanes per row).
#define RESONA_SEARCH_ATTEND_INSTANCES(X) \
  X(float, 8)                             \
  X(float, 16)                            \
  X(Half, 8)                              \
  X(Half, 16)                             \
  X(BFloat16, 8)                          \
  X(BFloat16, 16)

}  // namespace resona::cuda
