// The plan of the CUDA gradients of attention. See csrc/cuda/attend_backward.cuh for the kernels.
#pragma once

#include "common/plan_cuda.h"

namespace resona {

// What the plan counts with; attend_backward.cu asserts that the kernels agree.
constexpr int64_t kAttendBackwardRowThreads = 128, kAttendSinkRows = 512;
constexpr int64_t kAttendBackwardMostSegment = 1024, kAttendBackwardLaneWarps = 4;

struct CudaAttendBackwardPlan {
  const char* kernel;
  const char* reason;
  // A part is some batch entries, some queries of them (all, unless it is one entry) and some key/value heads
  // of each list. Parts run one after another, in the same workspace.
  int64_t batch, queries, heads;
  int64_t width;      // of the instance: head dims up to it
  int64_t tile;       // rows, and keys, that meet at once
  int64_t lane_keys;  // a warp per list instead, of chunks of so many tokens at most: 4 or 8; 0: tiles
  bool partials;      // d Q comes in parts; else a row selects one chunk of one tile of keys
  int64_t segment;    // rows of a list that one block adds up
  int64_t slab_rows;  // partial sums of long lists, per head: see attend_backward_params.cuh
  bool vector;        // 16-byte loads
  bool normalise;  // weights are divided by their sum: the lse alone is too coarse under a bias, and for fp32
  bool sink;       // there is one
  int64_t item_blocks, row_blocks;  // grids at most
  int64_t sequences;                // as in CudaFacts
  CudaDevice device;                // for the index of each part
  int64_t workspace_bytes;
};

struct AttendBackwardArrays {
  int32_t* chunk_begin;  // of packed sequences, else null
  float* delta;          // [batch, T, H]
  float* factor;         // [batch, T, H], null unless `normalise`
  float* sink_sums;      // [B, tiles of T, H], null without sink
  float* query_partial;  // [heads, slots of a part, G, D rounded up to 8], null without `partials`
  float* row_sums;       // [heads, slots of a part, G], null unless `normalise`
  float* slab;           // [heads, slab_rows, 2, S, D rounded up to 8]
  float* carried;        // [L, R, heads, 2, D rounded up to 8], null unless there are ranges of queries
};

CudaAttendBackwardPlan plan_attend_backward_cuda(const Shape&, DType, const CudaFacts&, bool has_bias,
                                                 bool has_sink, const CudaDevice&);
AttendBackwardArrays take_attend_backward(const CudaAttendBackwardPlan&, const Shape&, Workspace&);

// The part of batch entries `first_batch` ... and queries `first_query` ..., but for where its queries stand.
Shape part_of(const CudaAttendBackwardPlan&, const Shape&, int64_t first_batch, int64_t first_query);

}  // namespace resona
