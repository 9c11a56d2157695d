#include "cpu/buffer.h"
#include "cpu/decode.h"
#include "cpu/prefix.h"
#include "cpu/stages.h"
#include "ops/backend.h"
#include "ops/executor.h"

namespace resona::ops {
namespace {

class CpuBackend final : public Backend {
 public:
  bool writes_all() const override { return false; }

  void pool_chunks(const PoolProblem& p) const override {
    cpu::pool_chunks(p, plan_pool(p.shape, device_), executor_);
  }
  void pool_chunks_backward(const PoolBackwardProblem& p) const override {
    cpu::pool_chunks_backward(p, plan_pool(p.shape, device_), executor_);
  }
  void retrieve(const RetrieveProblem& p) const override {
    cpu::retrieve(p, plan_search(p.shape, p.query.dtype, device_), executor_);
  }
  void retrieve_two_level(const TwoLevelProblem& p) const override {
    cpu::retrieve_two_level(p, device_, executor_);
  }
  void retrieve_backward(const RetrieveBackwardProblem& p) const override {
    cpu::retrieve_backward(p, plan_search(p.shape, p.query.dtype, device_), executor_);
  }
  void attend(const AttendProblem& p) const override {
    cpu::attend(p, plan_attend(p.shape, p.query.dtype, device_), executor_);
  }
  void retrieve_attend(const FusedProblem& problem) const override {
    cpu::Buffer<unsigned char> chunks(bytes_of_chunks(problem.pool.shape, problem.pool.context.dtype));
    const FusedProblem p = with_chunks(problem, chunks.data());
    pool_chunks(p.pool);
    retrieve(p.retrieve);
    attend(p.attend);
  }
  void attend_backward(const AttendBackwardProblem& p) const override {
    cpu::attend_backward(p, plan_attend(p.forward.shape, p.forward.query.dtype, device_), executor_);
  }
  void decode_step(const DecodeProblem& p) const override {
    cpu::decode_step(p, plan_attend(p.shape, p.query.dtype, device_), executor_);
  }
  void prefix_linear_attention(const PrefixProblem& p) const override {
    cpu::prefix_linear_attention(p, plan_prefix(p.shape), executor_);
  }
  void prefix_linear_attention_backward(const PrefixBackwardProblem& p) const override {
    cpu::prefix_linear_attention_backward(p, plan_prefix(p.forward.shape), executor_);
  }
  void prefix_linear_attention_step(const PrefixStepProblem& p) const override {
    cpu::prefix_linear_attention_step(p, executor_);
  }

 private:
  TorchExecutor executor_;
  Device device_ = device();
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace resona::ops
