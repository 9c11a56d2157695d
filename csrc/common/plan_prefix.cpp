#include "common/plan_prefix.h"

#include <algorithm>

namespace resona {
namespace {

// Cutting a sequence costs its sums of keys and values a second time, so it happens only where sequences and
// heads alone are too few tasks, and never below the length at which that still pays.
constexpr int64_t kWantedTasks = 32, kLeastSegment = 512;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PrefixPlan plan_prefix(const PrefixShape& s) {
  const int64_t lanes = std::max<int64_t>(1, s.sequences * s.heads);
  if (lanes >= kWantedTasks)
    return {"sweep", "a task per sequence and head", std::max(kPrefixTile, s.tokens)};
  const int64_t pieces = ceil_div(kWantedTasks, lanes);
  const int64_t fair = ceil_div(ceil_div(s.tokens, pieces), kPrefixTile) * kPrefixTile;
  return {"segmented_sweep", "few sequences and heads: a task per segment, after their sums",
          std::max(kLeastSegment, fair)};
}

}  // namespace resona
