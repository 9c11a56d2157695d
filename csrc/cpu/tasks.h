// How a problem is cut into tasks: ranges of one sequence, each with a head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/problem.h"

namespace resona::cpu {

struct Task {
  const Sequence* sequence;
  int64_t head;
  int64_t begin, end;  // queries (rows of the query tensor) or chunks of the sequence
};

// `extent(sequence)` gives the half-open range that is cut into blocks.
template <class Extent>
std::vector<Task> make_tasks(const std::vector<Sequence>& sequences, int64_t heads, int64_t block,
                             const Extent& extent) {
  std::vector<Task> tasks;
  for (const Sequence& sequence : sequences) {
    const auto [first, last] = extent(sequence);
    for (int64_t begin = first; begin < last; begin += block)
      for (int64_t head = 0; head < heads; ++head)
        tasks.push_back({&sequence, head, begin, std::min(begin + block, last)});
  }
  return tasks;
}

inline auto query_extent(const Sequence& s) {
  return std::pair<int64_t, int64_t>(s.query_begin, s.query_begin + s.query_count);
}

}  // namespace resona::cpu
