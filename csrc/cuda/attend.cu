#include "cuda/attend.h"

namespace resona::cuda {

void attend(const AttendProblem& p, const CudaAttendPlan& plan, void* memory, Stream stream) {
  Workspace workspace(memory);
  switch (plan.path) {
    case AttendPath::kQuery:
    case AttendPath::kQueryMma:
      return attend_query(p, plan, workspace, stream);
    case AttendPath::kDense:
      return attend_dense(p, plan, workspace, stream);
    case AttendPath::kChunk:
      return attend_chunk(p, plan, workspace, stream);
  }
}

}  // namespace resona::cuda
