// Every instance of search_attend_kernel, to be looked at as machine code.
#include "cuda/search_attend.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kLanes)                                                  \
  template __global__ void search_attend_kernel<SearchAttendConfig<T, kLanes>>( \
      const __grid_constant__ SearchAttendParams<T>);
RESONA_SEARCH_ATTEND_INSTANCES(INSTANTIATE)

}  // namespace resona::cuda
