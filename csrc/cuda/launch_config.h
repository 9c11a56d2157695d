// How a kernel is launched, as plain data.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace resona::cuda {

struct Grid {  // blocks; x below 2^31, y and z below 2^16
  int64_t x, y = 1, z = 1;
};

struct Launch {
  const char* name;
  Grid grid;
  int threads;
  int64_t shared_bytes = 0;  // dynamic; above 48 KiB the kernel is opted in
  // The kernel calls griddepcontrol_wait() before it touches what earlier kernels wrote or read, so it may
  // begin while the one before it ends. Takes effect only where the running image has that instruction.
  bool dependent = false;
  const char* plan = "";
};

}  // namespace resona::cuda
