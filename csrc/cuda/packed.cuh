// Packed sequences, for the stages that meet them.
#pragma once

#include "common/plan_cuda.h"
#include "cuda/launch.h"
#include "cuda/sequences.cuh"

namespace resona::cuda {

// Starts chunk_offsets_kernel if there are packed sequences at all; `chunk_begin` is take_chunk_begin's. The
// kernel that gets the result may be `dependent`.
PackedSequences find_chunks(const DeviceSequences&, const Shape&, int32_t* chunk_begin, Stream);

}  // namespace resona::cuda
