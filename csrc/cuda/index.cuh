// The inverted index: for each chunk, the queries that selected it, in the order of the queries.
//
// Key (b R + r) C + chunk has a list of slots (query, retrieval head, j), in slot order. There are two ways
// to build the same lists; plan_index_cuda chooses.
//
//   index_quick.cuh   up to 4096 keys: two launches, one if the search has counted already
//   index_sort.cuh    any number: a counting sort, nine launches and more
//
//   list[at]          query row b T + t of each position; sorted_slots[at], the slot itself
//   position[slot]    the inverse, -1 where the slot is unused, out of range or not wholly in the past
//   offsets[key]      where a list begins; behind offsets[keys] nothing may be read
//   tile_begin[key]   where its row tiles begin, as find_work reads it
#pragma once

#include "cuda/device.cuh"
#include "cuda/scan.cuh"
#include "cuda/sequences.cuh"

namespace resona::cuda {

// Slots and keys are 32-bit, positions signed: a call holds fewer than 2^31 slots and 2^32 - 1 keys, and
// larger problems are split over queries.
struct IndexSlots {
  const int32_t* indices;                          // [B, T, R, k]
  int64_t batch, queries, heads, top_k;            // B, T, R, k
  int64_t context, chunk_size;                     // L, S
  int64_t chunks;                                  // C
  PackedSequences packed;                          // B == 1 if there are any
  int64_t queries_before = 0, queries_behind = 0;  // where T is a range of a batch entry's queries

  __device__ __forceinline__ int64_t count() const { return batch * queries * heads * top_k; }
  __device__ __forceinline__ int64_t keys() const { return batch * heads * chunks; }
  __device__ __forceinline__ QueryPlace place(int64_t query) const {
    return place_of_query(packed, queries_before + query, queries_before + queries + queries_behind, context,
                          chunk_size, chunks);
  }
};

// The work list, for whoever works on tiles: item `tile` is tile number `tile - begin` of list `key`.
struct WorkItem {
  int64_t key, begin;
};

__device__ __forceinline__ uint32_t work_items(const uint32_t* tile_begin, const uint32_t* totals,
                                               int64_t keys) {
  return scanned(tile_begin, totals, keys);
}

__device__ __forceinline__ WorkItem find_work(const uint32_t* tile_begin, const uint32_t* totals,
                                              int64_t keys, uint32_t tile) {
  int64_t low = 0, high = keys;  // the last key that begins at or before the tile: keys without tiles share
  while (low + 1 < high) {       // their begin with the next one, so it has some
    const int64_t middle = (low + high) / 2;
    if (scanned(tile_begin, totals, middle) <= tile)
      low = middle;
    else
      high = middle;
  }
  return {low, scanned(tile_begin, totals, low)};
}

}  // namespace resona::cuda
