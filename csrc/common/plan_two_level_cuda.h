// The plan of the two-level search on CUDA. See csrc/cuda/two_level.cuh for the kernel that refines.
#pragma once

#include "common/plan_cuda.h"
#include "common/plan_search_cuda.h"
#include "common/plan_two_level.h"

namespace resona {

constexpr int64_t kRefineRowsPerBlock = 4;  // two_level.cu asserts that the kernel agrees

struct CudaTwoLevelPlan {
  const char* kernel;
  const char* reason;
  bool exact;                      // `probe` is the exact search, and there is nothing else
  int64_t batch, heads, queries;   // of a part: the parts run one after another, in the same workspace
  CudaPoolPlan pool;               // of a part: its centroids
  CudaSearchPlan probe, last;      // of a part; of the last queries, which may be fewer
  int64_t centroid_bytes, probed;  // of a part; slots of its probes
  int64_t sequences;               // as in CudaFacts
  int64_t workspace_bytes;
};

struct TwoLevelArrays {
  int32_t *chunk_begin, *superchunk_begin;  // of packed sequences, else null
  unsigned char* centroids;                 // [batch, C / P, heads, E]
  int32_t* probed;                          // [batch, queries, heads, m]
  float* scores;                            // of those
};

// vector_rows: of the chunks.
CudaTwoLevelPlan plan_two_level_cuda(const TwoLevelProblem&, const CudaFacts&, const CudaDevice&);
// The rest of a plan whose parts are chosen.
void finish_two_level(CudaTwoLevelPlan&, const TwoLevelProblem&, const CudaFacts&, const CudaDevice&);

TwoLevelArrays take_two_level(const CudaTwoLevelPlan&, Workspace&);

// A part whose queries are rows [first, first + queries) of those of the problem, each in its place.
TwoLevelProblem part_of(TwoLevelProblem, const CudaTwoLevelPlan&, int64_t first, int64_t queries);

}  // namespace resona
