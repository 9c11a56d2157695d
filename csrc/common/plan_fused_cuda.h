// The plan of pool_chunks, retrieve and attend as one call on CUDA: the three stages' plans, and one
// workspace for all of them.
#pragma once

#include "common/plan_attend_cuda.h"
#include "common/plan_cuda.h"
#include "common/plan_search_cuda.h"

namespace resona {

constexpr int64_t kSearchAttendMostSlots = 2;  // of k; search_attend.cu asserts that the kernel agrees

struct CudaFusedFacts {
  DType embedding_dtype;
  bool vector_context;  // rows of the context embedding are rows_of_16_bytes
  CudaAttendFacts attend;
};

// Without a search for the chunks of packed sequences: that is done once, before.
struct CudaFusedStages {
  CudaPoolPlan pool;
  CudaSearchPlan search;
  CudaAttendPlan attend;
  bool counted;  // the search counts what the index of attention would count in a launch of its own
  bool attends;  // the search attends to what it finds: csrc/cuda/search_attend.cuh
  int64_t launches;

  int64_t counts() const { return counted ? attend.index.query_tiles * attend.index.count_pitch : 0; }
};

struct CudaFusedPlan {
  const char* kernel;
  const char* reason;
  int64_t batch;               // entries per part: the parts run one after another, in the same workspace
  CudaFusedStages part, last;  // the last part may be smaller
  int64_t sequences;           // as in CudaFacts
  int64_t chunk_bytes;         // of a part
  int64_t launches;
  int64_t workspace_bytes;
};

// The chunks live from the first stage to the second, the rest of the workspace in one stage each.
struct FusedArrays {
  int32_t* chunk_begin;   // of packed sequences, else null
  unsigned char* chunks;  // [batch, C, R, E]
  uint16_t* tile_counts;  // [counts()] of a part
};

CudaFusedPlan plan_fused_cuda(const Shape&, const CudaFusedFacts&, const CudaDevice&);
FusedArrays take_fused(const CudaFusedPlan&, Workspace&);

}  // namespace resona
