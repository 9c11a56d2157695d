// The host's side: run a test's runner and everything it launches.
#pragma once

#include <stdexcept>

#include "arguments.h"
#include "state.h"

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void run(Runner runner, const Arguments& arguments, const Options& options, std::deque<Region> global);

}  // namespace simt
