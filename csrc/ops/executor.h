// The threads of torch's CPU backend.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <thread>
#include <vector>

#include "common/plan.h"
#include "cpu/executor.h"
#include "cpu/kernels.h"
#include "ops/process.h"

namespace resona::ops {

// In a forked child torch's workers are gone. The thread sanitizer does not see the barriers of torch's
// OpenMP runtime, which is not built for it.
inline bool needs_own_threads() {
#if defined(__SANITIZE_THREAD__)
  return true;
#else
  return is_forked_child();
#endif
}

class TorchExecutor final : public cpu::Executor {
 public:
  int64_t threads() const override { return static_cast<int64_t>(torch::stable::get_num_threads()); }
  void run(int64_t workers, const std::function<void()>& body) const override {
    if (needs_own_threads()) return run_on_new_threads(workers, body);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body();
    });
  }

 private:
  static void run_on_new_threads(int64_t workers, const std::function<void()>& body) {
    std::vector<std::thread> threads;
    try {
      for (int64_t i = 1; i < workers; ++i) threads.emplace_back(body);
    } catch (const std::exception&) {  // no more to be had: those that run draw all tasks
    }
    body();
    for (std::thread& thread : threads) thread.join();
  }
};

// What plans are made for.
inline Device device() { return {TorchExecutor().threads(), cpu::kernel_set().tiles != nullptr}; }

}  // namespace resona::ops
