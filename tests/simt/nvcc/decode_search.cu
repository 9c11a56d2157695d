// Every instance of the search of a decode step, to be looked at as PTX and machine code.
#include "cuda/decode_refine.cuh"
#include "cuda/decode_search.cuh"

namespace resona::cuda {

#define INSTANTIATE(T)                                                                         \
  template __global__ void decode_search_kernel<DecodeSearchConfig<T>>(DecodeSearchParams<T>); \
  template __global__ void decode_refine_kernel<DecodeRefineConfig<T>>(DecodeRefineParams<T>);
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace resona::cuda
