// Every instance of refine_kernel, to be looked at as PTX and machine code.
#include "cuda/two_level.cuh"

namespace resona::cuda {

template __global__ void refine_kernel<float>(RefineParams<float>);
template __global__ void refine_kernel<Half>(RefineParams<Half>);
template __global__ void refine_kernel<BFloat16>(RefineParams<BFloat16>);

}  // namespace resona::cuda
