// Every instance of the backward pool kernel, to be looked at as machine code.
#include "cuda/pool_backward.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kLanes, kVector)                                                  \
  template __global__ void pool_backward_kernel<PoolBackwardConfig<T, kLanes, kVector>>( \
      PoolBackwardParams<T>);
RESONA_POOL_BACKWARD_INSTANCES(INSTANTIATE)

}  // namespace resona::cuda
