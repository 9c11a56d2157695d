// The plan of prefix linear attention on the CPU.
#pragma once

#include "common/prefix_problem.h"

namespace resona {

constexpr int64_t kPrefixTile = 64;  // tokens

struct PrefixPlan {
  const char* kernel;
  const char* reason;
  int64_t segment;  // tokens; each segment of a sequence and head is a task
};

// Depends on the shape alone: the order of every sum, hence every bit, is the same for any number of threads.
PrefixPlan plan_prefix(const PrefixShape& shape);

}  // namespace resona
