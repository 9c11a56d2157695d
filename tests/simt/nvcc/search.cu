// Every instance of search_kernel and the kernels around it, to be looked at as PTX and machine code.
#include "cuda/search.cuh"
#include "cuda/search_exact.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kPinned, kPerLane)                                     \
  template __global__ void search_kernel<SearchConfig<T, kPinned, kPerLane>>( \
      const __grid_constant__ SearchParams<T>);
RESONA_SEARCH_INSTANCES(INSTANTIATE)

#define INSTANTIATE_ROWS(T)                                              \
  template __global__ void search_norms_kernel<T>(SearchNormsParams<T>); \
  template __global__ void search_exact_kernel<T>(SearchExactParams<T>);
INSTANTIATE_ROWS(float)
INSTANTIATE_ROWS(Half)
INSTANTIATE_ROWS(BFloat16)

}  // namespace resona::cuda
