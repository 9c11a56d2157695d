// The search of a decode step.
//
// A query alone has nothing to share a chunk with, so each chunk is read once and scored canonically; the
// filter of the full search would cost more than it saves. In two levels the same is done twice:
//
//   centroids of the superchunks in the past -> the m best             unless there are no more than m
//   the chunks of those, and of the open superchunk -> the k best
#include "cpu/decode_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/canonical.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/stage_clock.h"

namespace resona::cpu {
namespace {

// The best chunks of a range, best first.
template <class A>
struct Best {
  explicit Best(int64_t slots) : slots(slots) {}

  // Chunks come in ascending order, or several such lists one after another: equals stay in that order.
  void insert(A score, int32_t index) {
    if (static_cast<int64_t>(scores.size()) == slots) {
      if (!canonical::later_ranks_above(score, scores.back())) return;
      scores.pop_back(), indices.pop_back();
    }
    size_t slot = scores.size();
    while (slot > 0 && canonical::later_ranks_above(score, scores[slot - 1])) --slot;
    scores.insert(scores.begin() + slot, score);
    indices.insert(indices.begin() + slot, index);
  }

  void join(Best&& later) {
    if (scores.empty()) {
      scores.swap(later.scores), indices.swap(later.indices);
      return;
    }
    for (size_t i = 0; i < later.scores.size(); ++i) insert(later.scores[i], later.indices[i]);
  }

  int64_t slots;
  std::vector<A> scores;
  std::vector<int32_t> indices;
};

struct Range {
  int64_t row;         // batch * R + head
  int64_t begin, end;  // chunks, or superchunks
};

// Long ranges are cut, so that one sequence with many chunks keeps all threads busy.
void add_range(const DecodeProblem& p, int64_t row, int64_t begin, int64_t end, std::vector<Range>& ranges) {
  const int64_t block = std::max<int64_t>(1, kWorthAThread / p.shape.retrieval_dim);
  for (; begin < end; begin += block) ranges.push_back({row, begin, std::min(begin + block, end)});
}

constexpr int64_t kScoredTogether = 8;

template <class A>
struct SearchScratch {
  explicit SearchScratch(int64_t dim) : query(dim), candidates(kScoredTogether * dim) {}
  Buffer<A> query, candidates;
};

template <class A>
Best<A> search_range(const DecodeProblem& p, const MutableRows& candidates, const Range& range, int64_t slots,
                     SearchScratch<A>& s) {
  const Kernels<A>& kernel = kernels<A>();
  const int64_t dim = p.shape.retrieval_dim;
  const int64_t batch = range.row / p.shape.retrieval_heads, head = range.row % p.shape.retrieval_heads;
  const Rows& query = p.query_embedding;
  kernel.load_row(query.dtype, query.at(batch, 0, head), s.query.data(), dim);
  const double norm = std::sqrt(kernel.canonical_dot(s.query.data(), s.query.data(), dim));
  Best<A> best(slots);
  for (int64_t first = range.begin; first < range.end; first += kScoredTogether) {
    const int64_t together = std::min(kScoredTogether, range.end - first);
    for (int64_t i = 0; i < together; ++i)
      kernel.load_row(candidates.dtype, candidates.at(batch, first + i, head), s.candidates.data() + i * dim,
                      dim);
    double dots[kScoredTogether];
    kernel.canonical_dots(s.query.data(), s.candidates.data(), together, dim, dots);
    for (int64_t i = 0; i < together; ++i)
      best.insert(canonical::score<A>(dots[i], norm), static_cast<int32_t>(first + i));
  }
  return best;
}

// Of every row, the best of its ranges, which are given in ascending order.
template <class A>
std::vector<Best<A>> search_ranges(const DecodeProblem& p, const MutableRows& candidates,
                                   const std::vector<Range>& ranges, int64_t slots,
                                   const Executor& executor) {
  std::vector<Best<A>> parts(ranges.size(), Best<A>(slots));
  for_each_task(
      executor, static_cast<int64_t>(ranges.size()), [&] { return SearchScratch<A>(p.shape.retrieval_dim); },
      [&](SearchScratch<A>& scratch, int64_t i) {
        const StageScope scope(Stage::kSearch);
        parts[i] = search_range(p, candidates, ranges[i], slots, scratch);
      });
  std::vector<Best<A>> rows(p.shape.batch * p.shape.retrieval_heads, Best<A>(slots));
  for (size_t i = 0; i < ranges.size(); ++i) rows[ranges[i].row].join(std::move(parts[i]));
  return rows;
}

int64_t eligible_of(const DecodeProblem& p, int64_t row) {
  return canonical::eligible_chunks(p.lengths[row / p.shape.retrieval_heads], p.shape.chunk_size);
}

// The superchunks that each row probes, ascending; none where all of its chunks are searched.
template <class A>
std::vector<std::vector<int32_t>> probed_superchunks(const DecodeProblem& p, const Executor& executor) {
  std::vector<Range> ranges;
  std::vector<std::vector<int32_t>> probed(p.shape.batch * p.shape.retrieval_heads);
  for (size_t row = 0; row < probed.size(); ++row) {
    const int64_t eligible = eligible_of(p, row);
    if (p.probes_centroids(eligible)) add_range(p, row, 0, eligible / p.superchunk_size, ranges);
  }
  if (ranges.empty()) return probed;
  std::vector<Best<A>> best = search_ranges<A>(p, p.superchunks, ranges, p.probes, executor);
  for (size_t row = 0; row < probed.size(); ++row) {
    probed[row] = std::move(best[row].indices);
    std::sort(probed[row].begin(), probed[row].end());
  }
  return probed;
}

// The chunks to be scored, ascending in every row.
std::vector<Range> chunk_ranges(const DecodeProblem& p, const std::vector<std::vector<int32_t>>& probed) {
  std::vector<Range> ranges;
  for (size_t row = 0; row < probed.size(); ++row) {
    const int64_t eligible = eligible_of(p, row), size = p.superchunk_size;
    for (const int64_t superchunk : probed[row])
      add_range(p, row, superchunk * size, (superchunk + 1) * size, ranges);
    const bool probes = p.probes_centroids(eligible);
    add_range(p, row, probes ? eligible / size * size : 0, eligible, ranges);
  }
  return ranges;
}

}  // namespace

int64_t scored_rows(const DecodeProblem& p, int64_t batch) {
  const int64_t eligible = canonical::eligible_chunks(p.lengths[batch], p.shape.chunk_size);
  if (!p.probes_centroids(eligible)) return eligible;
  return eligible / p.superchunk_size + canonical::searched_chunks(eligible, p.superchunk_size, p.probes);
}

template <class A>
void decode_search(const DecodeProblem& p, const Executor& executor) {
  const std::vector<Range> ranges = chunk_ranges(p, probed_superchunks<A>(p, executor));
  const std::vector<Best<A>> best = search_ranges<A>(p, p.chunks, ranges, p.shape.top_k, executor);
  const int64_t top_k = p.shape.top_k;
  A* scores = static_cast<A*>(p.scores);
  int32_t* indices = p.indices;
  for (size_t row = 0; row < best.size(); ++row, scores += top_k, indices += top_k) {
    std::fill(std::copy(best[row].scores.begin(), best[row].scores.end(), scores), scores + top_k,
              -std::numeric_limits<A>::infinity());
    std::fill(std::copy(best[row].indices.begin(), best[row].indices.end(), indices), indices + top_k, -1);
  }
}

template void decode_search<float>(const DecodeProblem&, const Executor&);
template void decode_search<double>(const DecodeProblem&, const Executor&);

}  // namespace resona::cpu
