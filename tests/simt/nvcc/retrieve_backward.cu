// Every instance of the kernels of retrieve_backward.cuh, to be looked at as machine code.
#include "cuda/retrieve_backward.cuh"

namespace resona::cuda {

#define INSTANTIATE(T)                                                                   \
  template __global__ void retrieve_query_gradient_kernel<T>(RetrieveBackwardParams<T>); \
  template __global__ void retrieve_chunk_segments_kernel<T>(RetrieveBackwardParams<T>); \
  template __global__ void retrieve_chunk_gradient_kernel<T>(RetrieveBackwardParams<T>);
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace resona::cuda
