#include "cuda/attend.h"

#include "cuda/packed.cuh"
#include "cuda/stages.h"

namespace resona::cuda {

void attend(const AttendProblem& p, const CudaAttendPlan& plan, void* memory, Stream stream) {
  Workspace workspace(memory);
  int32_t* chunk_begin = take_chunk_begin(plan.sequences, workspace);
  attend(p, plan, find_chunks(p.packed, p.shape, chunk_begin, stream), workspace, stream);
}

void attend(const AttendProblem& p, const CudaAttendPlan& plan, const PackedSequences& packed,
            Workspace workspace, Stream stream) {
  switch (plan.path) {
    case AttendPath::kQuery:
    case AttendPath::kQueryMma:
      return attend_query(p, plan, packed, stream);
    case AttendPath::kDense:
      return attend_dense(p, plan, packed, stream);
    case AttendPath::kChunk:
      return attend_chunk(p, plan, packed, workspace, stream);
  }
}

}  // namespace resona::cuda
