// The plan of the two-level search, and the problems that it consists of. Every device obeys the same one,
// since the sizes decide what is found.
#pragma once

#include <cstdint>
#include <optional>

#include "common/plan.h"
#include "common/problem.h"

namespace resona {

struct TwoLevelPlan {
  int64_t superchunk_size;  // P, chunks
  int64_t probes;           // m, superchunks per query
  const char* reason;
};

// What is not given is chosen from L, S and k.
TwoLevelPlan plan_two_level(const Shape&, std::optional<int64_t> superchunk_size,
                            std::optional<int64_t> probes);

// A retrieval among the chunks of m superchunks per query, and of the one that is still open there.
struct TwoLevelProblem {
  RetrieveProblem retrieve;
  TwoLevelPlan plan;

  int64_t superchunks() const {  // rows of the centroid tensor
    return retrieve.shape.context / retrieve.shape.chunk_size / plan.superchunk_size;
  }
  // No query has more whole superchunks in its past than it may search, so this is the exact search.
  bool is_exact() const { return superchunks() <= plan.probes; }
};

// Chunks are to superchunks what tokens are to chunks.
Shape centroid_shape(const TwoLevelProblem&);
Shape probe_shape(const TwoLevelProblem&);

inline int64_t bytes_of_centroids(const TwoLevelProblem& p) {
  const Shape& s = p.retrieve.shape;
  return s.batch * p.superchunks() * s.retrieval_heads * s.retrieval_dim * size_of(p.retrieve.chunks.dtype);
}

// The CPU's: tiles of chunks are superchunks, and meet the queries of a block that probe them.
SearchPlan plan_refine(const TwoLevelProblem&, const Device& device);

}  // namespace resona
