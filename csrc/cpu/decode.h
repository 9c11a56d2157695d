// One token per sequence on the CPU.
#pragma once

#include "common/decode_problem.h"
#include "common/plan.h"
#include "cpu/executor.h"

namespace resona::cpu {

// Searches, attends, then appends: nothing is written to the cache before all results are there.
// `plan` is that of the shape; work too small for several threads runs on the caller's.
void decode_step(const DecodeProblem&, const AttendPlan& plan, const Executor&);

}  // namespace resona::cpu
