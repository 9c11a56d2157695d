// Every instance of the attention of a decode step, to be looked at as machine code.
#include "cuda/decode_attend.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kLanes, kHeads, kVector)                                                \
  template __global__ void decode_lanes_kernel<AttendQueryConfig<T, kLanes, kHeads, kVector>>( \
      DecodeAttendParams<T>);
RESONA_DECODE_LANES_INSTANCES(INSTANTIATE)

#define INSTANTIATE_MMA(T, kDim, kHeadTiles)                                             \
  template __global__ void decode_mma_kernel<AttendQueryMmaConfig<T, kDim, kHeadTiles>>( \
      DecodeAttendParams<T>);
RESONA_ATTEND_QUERY_MMA_INSTANCES(INSTANTIATE_MMA)

}  // namespace resona::cuda
