// Every instance of the gradients of prefix linear attention, to be looked at as machine code.
#include "cuda/prefix_backward.cuh"

namespace resona::cuda {

#define INSTANTIATE(T)                                                               \
  template __global__ void prefix_query_gradient_kernel<T>(PrefixBackwardParams<T>); \
  template __global__ void prefix_gradient_sums_kernel<T>(PrefixBackwardParams<T>);  \
  template __global__ void prefix_key_gradient_kernel<T>(PrefixBackwardParams<T>);   \
  template __global__ void prefix_rows_gradient_kernel<T>(PrefixBackwardParams<T>);  \
  template __global__ void prefix_gather_kernel<T>(PrefixGatherParams<T>);
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
INSTANTIATE(float)

}  // namespace resona::cuda
