// The CPU backend: one function per stage. Problems arrive checked; a stage obeys its plan.
#pragma once

#include "common/plan.h"
#include "common/plan_two_level.h"
#include "common/problem.h"
#include "cpu/executor.h"

namespace resona::cpu {

void pool_chunks(const PoolProblem&, const PoolPlan&, const Executor&);
void pool_chunks_backward(const PoolBackwardProblem&, const PoolPlan&, const Executor&);

void retrieve(const RetrieveProblem&, const SearchPlan&, const Executor&);
void retrieve_two_level(const TwoLevelProblem&, const Device&, const Executor&);
void retrieve_backward(const RetrieveBackwardProblem&, const SearchPlan&, const Executor&);

void attend(const AttendProblem&, const AttendPlan&, const Executor&);
// What a plan with by_query means.
void attend_by_query(const AttendProblem&, const AttendPlan&, const Executor&);
void attend_backward(const AttendBackwardProblem&, const AttendPlan&, const Executor&);

}  // namespace resona::cpu
