// The plan of attention on CUDA: which of four kernels, and how. The kernels say at their heads why they
// exist.
#pragma once

#include "common/plan_cuda.h"

namespace resona {

enum class AttendPath {
  kQuery,     // csrc/cuda/attend_query.cuh: a row gathers its keys, any problem
  kQueryMma,  // csrc/cuda/attend_query_mma.cuh: the same on tensor cores
  kDense,     // csrc/cuda/attend_dense.cuh: short contexts, all keys under a mask
  kChunk,     // csrc/cuda/attend_chunk.cuh: a chunk meets all rows that selected it
};

// What the plan has to know besides the shape.
struct CudaAttendFacts {
  CudaFacts rows;
  DType dtype;
  bool distinct;  // no index twice in a row
  bool bias;
  int64_t reserved_bytes = 0;  // of the call's workspace that are not attention's
};

struct CudaAttendPlan {
  AttendPath path;
  const char* kernel;
  const char* reason;
  int64_t dim;     // of the instance: rows are filled up to it
  bool vector;     // 16-byte loads
  int64_t blocks;  // of the attention kernel

  int64_t heads, splits;  // query paths: heads at once; teams that share the keys of a row

  // Chunk path. Queries are worked off in ranges, and of these some heads at a time, one after the other, in
  // the same workspace. A range has an index, for all its heads.
  int64_t range_batch, range_queries;  // batch entries and queries of a range; more than one entry only whole
  int64_t range_heads;                 // key/value heads of each list at a time
  CudaIndexPlan index, last_index;     // of a range; of the last, which may be smaller
  int64_t item_rows, key_rows, key_slots;
  bool ahead, half_partials;
  int64_t merge_blocks;

  int64_t sequences;  // as in CudaFacts
  int64_t workspace_bytes;
};

struct AttendArrays {
  void* partial;         // [range_heads, slots of a range, G, D rounded up to 8], fp32 or fp16
  float* partial_lse;    // [range_heads, slots, G]
  float* partial_scale;  // [range_heads, slots, G], of fp16, else null
};

CudaAttendPlan plan_attend_cuda(const Shape&, const CudaAttendFacts&, const CudaDevice&);

// Without the one that finds the chunks of packed sequences.
int64_t launches_of(const CudaAttendPlan&, const Shape&);

// Takes the index too, behind what is returned: build_index does so again.
AttendArrays take_attend(const CudaAttendPlan&, const Shape&, Workspace&);

}  // namespace resona
