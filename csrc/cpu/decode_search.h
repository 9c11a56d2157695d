// Which chunks the new token of each sequence retrieves.
#pragma once

#include "common/decode_problem.h"
#include "cpu/executor.h"

namespace resona::cpu {

// Multiplications that are worth another thread: waking one costs microseconds, far more on a busy machine,
// and a step is one of many short calls.
constexpr int64_t kWorthAThread = 1 << 20;

// Fills indices and scores. A is float, or double for float64 embeddings.
template <class A>
void decode_search(const DecodeProblem&, const Executor&);

// Rows, of chunks and of superchunks, that this scores for one retrieval head of a sequence.
int64_t scored_rows(const DecodeProblem&, int64_t batch);

}  // namespace resona::cpu
