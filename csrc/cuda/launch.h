// The CUDA backend as the operators see it: one function per stage, on the caller's stream and in the
// caller's workspace. No CUDA header and no torch. Problems arrive checked; a stage obeys its plan, starts
// its kernels and returns: it never waits for the device, allocates or reads what the device computed, so
// every stage may be captured into a graph. The device of the stream is the current one.
#pragma once

#include "common/plan_cuda.h"
#include "common/plan_search_cuda.h"
#include "common/problem.h"

namespace resona::cuda {

struct Stream {
  void* handle;  // cudaStream_t
  int device;
};

// What plans are made for. Raises where the device is older than the kernels.
CudaDevice describe_device(int device);

bool is_capturing(Stream);

void pool_chunks(const PoolProblem&, const CudaPoolPlan&, void* workspace, Stream);
void pool_chunks_backward(const PoolBackwardProblem&, const CudaPoolPlan&, void* workspace, Stream);

void retrieve(const RetrieveProblem&, const CudaSearchPlan&, void* workspace, Stream);
void retrieve_backward(const RetrieveBackwardProblem&, const CudaRetrieveBackwardPlan&, void* workspace,
                       Stream);

}  // namespace resona::cuda
