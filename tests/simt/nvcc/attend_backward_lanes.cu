// Every instance of the gradients of attention by a warp per list, to be looked at as machine code.
#include "cuda/attend_backward_lanes.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kPerLane, kKeys)                                                                 \
  template __global__ void attend_backward_lanes_kernel<AttendBackwardLanesConfig<T, kPerLane, kKeys>>( \
      AttendBackwardParams<T>);
RESONA_ATTEND_BACKWARD_LANES_INSTANCES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace resona::cuda
