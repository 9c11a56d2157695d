// Every instance of prefix linear attention and its step, to be looked at as machine code.
#include "cuda/prefix_forward.cuh"
#include "cuda/prefix_step.cuh"

namespace resona::cuda {

#define INSTANTIATE(T)                                                                 \
  template __global__ void prefix_sums_kernel<T>(PrefixParams<T>);                     \
  template __global__ void prefix_scan_kernel<T>(PrefixParams<T>, PrefixStates, bool); \
  template __global__ void prefix_sweep_kernel<T>(PrefixParams<T>);                    \
  template __global__ void prefix_step_kernel<T>(PrefixStepParams<T>);
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
INSTANTIATE(float)

}  // namespace resona::cuda
