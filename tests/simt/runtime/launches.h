// For runners that look at what they have launched.
#pragma once

#include <cstdint>

namespace simt {

int64_t launches_so_far();  // of this run

}  // namespace simt
