// Launching in the simulator: the same calls, so that the .cu files of csrc/cuda run here as they are.
#pragma once

#include <tuple>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/launch_config.h"

namespace resona::cuda {

template <class... Parameters>
void launch(const Launch& how, Stream, void (*kernel)(Parameters...),
            std::common_type_t<Parameters>... parameters) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
  check_grid(how);
  const dim3 grid(static_cast<unsigned>(how.grid.x), static_cast<unsigned>(how.grid.y),
                  static_cast<unsigned>(how.grid.z));
  const simt::LaunchConfig config{how.name, grid, dim3(static_cast<unsigned>(how.threads)),
                                  static_cast<size_t>(how.shared_bytes), how.dependent};
  simt::launch(config, [=] { kernel(parameters...); });
}

}  // namespace resona::cuda
