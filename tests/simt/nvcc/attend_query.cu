// Every instance of the query-stationary attention kernels, to be looked at as machine code.
#include "cuda/attend_query.cuh"
#include "cuda/attend_query_mma.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kLanes, kHeads, kVector)                                                \
  template __global__ void attend_query_kernel<AttendQueryConfig<T, kLanes, kHeads, kVector>>( \
      AttendParams<T>, int);
RESONA_ATTEND_QUERY_INSTANCES(INSTANTIATE)

#define INSTANTIATE_MMA(T, kDim, kHeadTiles)                                                   \
  template __global__ void attend_query_mma_kernel<AttendQueryMmaConfig<T, kDim, kHeadTiles>>( \
      AttendParams<T>, int);
RESONA_ATTEND_QUERY_MMA_INSTANCES(INSTANTIATE_MMA)

}  // namespace resona::cuda
