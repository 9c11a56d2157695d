// The plan of the CUDA search. See csrc/cuda/search.cuh for the kernels.
#pragma once

#include "common/plan_cuda.h"

namespace resona {

// What the plan counts with; search.cu asserts that the kernels agree.
constexpr int64_t kSearchTileRows = 128, kSearchStepChunks = 64;
constexpr int64_t kSearchMostCandidates = 256;  // of a row
constexpr int64_t kSearchMostSlots = 256;       // of k, with candidates

// What the plan has to know besides the shape.
struct CudaSearchFacts {
  DType dtype;        // of the embeddings
  bool unit_chunks;   // as in RetrieveProblem
  int64_t sequences;  // as in CudaFacts
};

struct CudaSearchPlan {
  const char* kernel;
  const char* reason;
  bool norms;            // of the chunks have to be found
  bool candidates;       // else every row is scored canonically in full
  bool pinned;           // queries stay in registers
  int64_t bag_per_lane;  // candidates of a row: 4 x this, per pass and split
  int64_t passes, splits;
  int64_t tiles, window_tiles;        // tiles of 128 queries in all, and per launch
  int64_t norm_blocks, exact_blocks;  // 0 without that kernel
  int64_t sequences;                  // as in CudaFacts
  int64_t workspace_bytes;

  int64_t windows() const { return (tiles + window_tiles - 1) / window_tiles; }
  int64_t groups() const { return passes * splits; }
  int64_t tickets() const { return splits > 1 ? tiles : 0; }
};

// With one pass and one split candidates never leave the block, and all of these but the norms are null.
struct SearchArrays {
  int32_t* candidates;  // [window rows, groups, 4 bag_per_lane]
  float* cutoffs;       // [window rows, splits]
  uint32_t* tickets;    // [tickets()], cleared by the kernel before the search: that of the norms, or pooling
  float* norms;         // [B, R, steps], null for unit chunks
  uint64_t* keys;       // [exact_blocks, C], null with candidates
};

CudaSearchPlan plan_search_cuda(const Shape&, const CudaSearchFacts&, const CudaDevice&);

// Without the one that finds the chunks of packed sequences.
int64_t launches_of(const CudaSearchPlan&);

SearchArrays take_search(const CudaSearchPlan&, const Shape&, Workspace&);

}  // namespace resona
