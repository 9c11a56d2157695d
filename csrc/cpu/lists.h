// The selection turned around: for each chunk, the (row, slot) pairs that selected it, in row order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/stage_clock.h"

namespace resona::cpu {

struct Entry {
  int32_t row;   // counted from the first row of the range
  int32_t slot;  // 0 ... k - 1
};

struct Run {  // the entries of one chunk
  int64_t chunk;
  int64_t begin, end;
};

struct ChunkLists {
  std::vector<Entry> entries;
  std::vector<Run> runs;  // chunks that nobody selected have none; ascending
};

namespace detail {

// Counting sort by chunk; keeps the order of entries within a chunk.
inline void sort_by_counting(const std::vector<int32_t>& chunk_of, const std::vector<Entry>& unsorted,
                             int64_t chunks, ChunkLists& lists) {
  std::vector<int64_t> next(chunks + 1, 0);
  for (const int32_t chunk : chunk_of) ++next[chunk + 1];
  for (int64_t c = 0; c < chunks; ++c) {
    if (next[c + 1] > 0) lists.runs.push_back({c, next[c], next[c] + next[c + 1]});
    next[c + 1] += next[c];
  }
  for (size_t i = 0; i < unsorted.size(); ++i) lists.entries[next[chunk_of[i]]++] = unsorted[i];
}

// For few entries among many chunks.
inline void sort_by_comparison(const std::vector<int32_t>& chunk_of, const std::vector<Entry>& unsorted,
                               ChunkLists& lists) {
  std::vector<int64_t> order(unsorted.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return chunk_of[a] < chunk_of[b]; });
  for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) {
    lists.entries[i] = unsorted[order[i]];
    const int64_t chunk = chunk_of[order[i]];
    if (lists.runs.empty() || lists.runs.back().chunk != chunk) lists.runs.push_back({chunk, i, i});
    lists.runs.back().end = i + 1;
  }
}

}  // namespace detail

// `index_of(row, slot)` gives the chunk, or a negative number for a slot that does not count.
template <class IndexOf>
ChunkLists build_lists(int64_t rows, int64_t slots, int64_t chunks, const IndexOf& index_of) {
  const StageScope index(Stage::kIndex);
  std::vector<int32_t> chunk_of;
  std::vector<Entry> unsorted;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int32_t chunk = index_of(row, slot);
      if (chunk < 0) continue;
      chunk_of.push_back(chunk);
      unsorted.push_back({static_cast<int32_t>(row), static_cast<int32_t>(slot)});
    }
  ChunkLists lists;
  lists.entries.resize(unsorted.size());
  if (chunks <= 4 * static_cast<int64_t>(unsorted.size()))
    detail::sort_by_counting(chunk_of, unsorted, chunks, lists);
  else
    detail::sort_by_comparison(chunk_of, unsorted, lists);
  return lists;
}

}  // namespace resona::cpu
