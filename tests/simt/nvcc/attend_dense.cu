// Every instance of the dense attention kernel, to be looked at as machine code.
#include "cuda/attend_dense.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kDim, kKeys)                                                                       \
  static_assert(sizeof(AttendDenseStorage<AttendDenseConfig<T, kDim, kKeys>>) <= 99 * 1024, "for sm_86"); \
  template __global__ void attend_dense_kernel<AttendDenseConfig<T, kDim, kKeys>>(AttendParams<T>);
RESONA_ATTEND_DENSE_INSTANCES(INSTANTIATE)

}  // namespace resona::cuda
