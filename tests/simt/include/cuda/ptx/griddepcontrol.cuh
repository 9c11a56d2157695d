// Host twin of csrc/cuda/ptx/griddepcontrol.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline void griddepcontrol_wait(simt::Site site = simt::Site::here()) { simt::wait_for_primary(site); }

inline void griddepcontrol_launch_dependents(simt::Site site = simt::Site::here()) {
  simt::launch_dependents(site);
}

}  // namespace resona::cuda::ptx
