// How a kernel is launched, as plain data, and which grids there are.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

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

inline std::string text_of(const Grid& g) {
  return "[" + std::to_string(g.x) + ", " + std::to_string(g.y) + ", " + std::to_string(g.z) + "]";
}

inline void check_grid(const Launch& l) {
  const Grid& g = l.grid;
  const int64_t most_x = (int64_t{1} << 31) - 1, most_yz = (1 << 16) - 1;
  if (g.x <= most_x && g.y <= most_yz && g.z <= most_yz) return;
  throw std::runtime_error("resona::cuda: " + std::string(l.name) +
                           ": expected a grid of at most [2147483647, 65535, 65535] blocks, got " +
                           text_of(g) + " (plan: " + l.plan + ")");
}

}  // namespace resona::cuda
