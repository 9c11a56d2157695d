// The stages inside a call: whose chunks are whose has been found, and the workspace is free from where it
// stands.
#pragma once

#include "common/plan_fused_cuda.h"
#include "cuda/launch.h"
#include "cuda/sequences.cuh"

namespace resona::cuda {

// What a stage clears for one behind it.
struct Counters {
  uint32_t* at;
  int64_t count;
};

void pool_chunks(const PoolProblem&, const CudaPoolPlan&, const PackedSequences&, const Counters&, Stream);

// The tickets of unit chunks have been cleared.
void retrieve(const RetrieveProblem&, const CudaSearchPlan&, const PackedSequences&, Workspace, Stream);
void attend(const AttendProblem&, const CudaAttendPlan&, const PackedSequences&, Workspace, Stream);

// Both of them, where the plan says `attends`.
void search_attend(const FusedProblem&, const CudaFusedStages&, const PackedSequences&, Workspace, Stream);

// The paths of attention; the plan names one.
void attend_query(const AttendProblem&, const CudaAttendPlan&, const PackedSequences&, Stream);
void attend_dense(const AttendProblem&, const CudaAttendPlan&, const PackedSequences&, Stream);
void attend_chunk(const AttendProblem&, const CudaAttendPlan&, const PackedSequences&, Workspace, Stream);

}  // namespace resona::cuda
