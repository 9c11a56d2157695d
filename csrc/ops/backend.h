// Where an operator runs. Arguments are checked and results allocated before; a backend makes the plan, finds
// the scratch that it wants and obeys.
#pragma once

#include <memory>

#include "common/decode_problem.h"
#include "common/plan_two_level.h"
#include "common/prefix_problem.h"
#include "common/problem.h"
#include "ops/tensor.h"

namespace resona::ops {

class Backend {
 public:
  virtual ~Backend() = default;

  // Whether results are written as a whole. Where not, those that may stay zero in part must be zero on
  // entry.
  virtual bool writes_all() const = 0;

  virtual void pool_chunks(const PoolProblem&) const = 0;
  virtual void pool_chunks_backward(const PoolBackwardProblem&) const = 0;
  virtual void retrieve(const RetrieveProblem&) const = 0;
  virtual void retrieve_two_level(const TwoLevelProblem&) const = 0;
  virtual void retrieve_backward(const RetrieveBackwardProblem&) const = 0;
  virtual void attend(const AttendProblem&) const = 0;
  virtual void retrieve_attend(const FusedProblem&) const = 0;
  virtual void attend_backward(const AttendBackwardProblem&) const = 0;
  virtual void decode_step(const DecodeProblem&) const = 0;
  virtual void prefix_linear_attention(const PrefixProblem&) const = 0;
  virtual void prefix_linear_attention_backward(const PrefixBackwardProblem&) const = 0;
  virtual void prefix_linear_attention_step(const PrefixStepProblem&) const = 0;
};

std::unique_ptr<Backend> make_cpu_backend();

// Whether this build has CUDA kernels.
bool has_cuda();

// Whether work on the device of a CUDA tensor is being recorded into a graph.
bool is_capturing(const Tensor&);

// Makes the device of `like` the current one until the backend goes.
std::unique_ptr<Backend> make_cuda_backend(const Tensor& like);

// For one call, on the device of checked tensors.
inline std::unique_ptr<Backend> backend_of(const Tensor& like) {
  return like.is_cuda() ? make_cuda_backend(like) : make_cpu_backend();
}

// A result that a backend may fill in part.
inline Tensor sparse_result(const Backend& backend, const Tensor& like, const std::vector<int64_t>& size,
                            ScalarType type) {
  return backend.writes_all() ? empty(like, size, type) : zeros(like, size, type);
}

}  // namespace resona::ops
