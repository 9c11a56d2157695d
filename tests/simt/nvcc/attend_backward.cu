// Every instance of the gradients of attention, to be looked at as machine code.
#include "cuda/attend_backward.cuh"
#include "cuda/attend_backward_keys.cuh"
#include "cuda/attend_backward_rows.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kDim) \
  template __global__ void attend_backward_kernel<AttendBackwardConfig<T, kDim>>(AttendBackwardParams<T>);
RESONA_ATTEND_BACKWARD_INSTANCES(INSTANTIATE)
#undef INSTANTIATE

#define INSTANTIATE(T)                                                               \
  template __global__ void attend_delta_kernel<T>(AttendBackwardParams<T>);          \
  template __global__ void attend_factor_kernel<T>(AttendBackwardParams<T>);         \
  template __global__ void attend_query_gradient_kernel<T>(AttendBackwardParams<T>); \
  template __global__ void attend_bias_gradient_kernel<T>(AttendBackwardParams<T>);  \
  template __global__ void attend_sink_rows_kernel<T>(AttendSinkParams<T>);          \
  template __global__ void attend_key_gradient_kernel<T>(AttendBackwardParams<T>);
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
INSTANTIATE(float)

}  // namespace resona::cuda
