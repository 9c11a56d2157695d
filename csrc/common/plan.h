// Decisions as data: which kernel, which tiles, how much workspace, and why. Pure functions of the shape
// and of a description of the device, so a plan can be printed or tested on any machine.
#pragma once

#include <cstdint>

#include "common/problem.h"

namespace resona {

struct Device {
  int64_t threads;
  bool tiles = false;  // multiplies matrices of bfloat16 (AMX)
};

struct PoolPlan {
  const char* kernel;
  const char* reason;
  int64_t chunks_per_task;
};

struct SearchPlan {
  const char* kernel;
  const char* reason;
  int64_t query_block;  // queries per task
  int64_t chunk_block;  // chunks per tile
  bool tiles;           // quick products of bfloat16 on matrix tiles; else of float32
};

struct AttendPlan {
  const char* kernel;
  const char* reason;
  int64_t query_range;     // queries per task; its accumulators live in the task's scratch
  int64_t row_tile;        // gathered query rows per tile
  int64_t key_tile;        // keys per tile
  int64_t kept_tiles;      // forward: key tiles of a head that stay packed for all its queries; 0: none do
  int64_t list_chunks;     // backward: chunks per task
  bool tiles;              // products of bfloat16 on matrix tiles; else in the accumulation type
  bool by_query;           // forward: keys and values are read for each query, no lists
  int64_t query_block;     // then: queries per task
  int64_t heads_per_task;  // then: of key/value heads, which share a selection
};

struct Plan {
  PoolPlan pool;
  SearchPlan search;
  AttendPlan attend;
  int64_t workspace_bytes;  // bound for one forward call: scratch of all threads and the pooled chunks
};

// Every legal problem has a plan. float64 embeddings are searched exhaustively.
Plan make_plan(const Shape& shape, DType dtype, DType embedding_dtype, const Device& device);

PoolPlan plan_pool(const Shape& shape, const Device& device);
SearchPlan plan_search(const Shape& shape, DType embedding_dtype, const Device& device);
AttendPlan plan_attend(const Shape& shape, DType dtype, const Device& device);

}  // namespace resona
