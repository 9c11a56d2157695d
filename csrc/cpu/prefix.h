// Prefix linear attention on the CPU. Problems arrive checked; a stage obeys its plan.
#pragma once

#include "common/plan_prefix.h"
#include "cpu/executor.h"

namespace resona::cpu {

void prefix_linear_attention(const PrefixProblem&, const PrefixPlan&, const Executor&);
void prefix_linear_attention_backward(const PrefixBackwardProblem&, const PrefixPlan&, const Executor&);
void prefix_linear_attention_step(const PrefixStepProblem&, const Executor&);

}  // namespace resona::cpu
