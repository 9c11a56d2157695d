// The inverted index, for the stages that work chunk by chunk.
#pragma once

#include "common/plan_cuda.h"
#include "cuda/launch.h"
#include "cuda/sequences.cuh"

namespace resona::cuda {

struct IndexProblem {
  Shape shape;
  const int32_t* indices;  // [B, T, R, k]
  PackedSequences packed;
  int64_t rows_per_query;                          // rows of a list per query: heads that share a selection
  int64_t tile_rows;                               // rows of a tile in the work list
  int64_t queries_before = 0, queries_behind = 0;  // where T is a range of a batch entry's queries
};

// Gives sorted_slots, offsets and the work list (tile_begin, tile_totals: see find_work).
IndexArrays build_index(const IndexProblem&, const CudaIndexPlan&, Workspace&, Stream);

// Then, for those who want them, list and position.
void write_lists(const IndexProblem&, const IndexArrays&, const CudaIndexPlan&, Stream);

}  // namespace resona::cuda
