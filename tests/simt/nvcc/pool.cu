// Every instance of the pool kernels, to be looked at as PTX and machine code.
#include "cuda/pool.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kLanes, kVector) \
  template __global__ void pool_kernel<PoolConfig<T, kLanes, kVector>>(PoolParams<T>);
RESONA_POOL_INSTANCES(INSTANTIATE)

const void* chunk_offsets() { return reinterpret_cast<const void*>(chunk_offsets_kernel); }

}  // namespace resona::cuda
