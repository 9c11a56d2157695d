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
  bool wants_positions = true;                     // list and position; else offsets and sorted_slots only

  // For a quick plan, [query_tiles, count_pitch]: how many slots of tile (b R + r) ceil(T / 128) + t / 128
  // name chunk row c, for each c < C, then zeros up to the pitch. Counted is what position_of and list have:
  // no slot that is unused, out of range or not eligible. Null: build_index counts.
  const uint16_t* tile_counts = nullptr;
};

// Gives offsets, sorted_slots, the work list (tile_begin, tile_totals: see find_work), list and position.
IndexArrays build_index(const IndexProblem&, const CudaIndexPlan&, Workspace&, Stream);

}  // namespace resona::cuda
