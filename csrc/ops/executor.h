// The threads of torch's CPU backend.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <thread>
#include <vector>

#include "common/plan.h"
#include "cpu/executor.h"
#include "cpu/kernels.h"

namespace resona::ops {

class TorchExecutor final : public cpu::Executor {
 public:
  int64_t threads() const override { return static_cast<int64_t>(torch::stable::get_num_threads()); }
  void run(int64_t workers, const std::function<void()>& body) const override {
#if defined(__SANITIZE_THREAD__)
    // The sanitizer does not see the barriers of torch's OpenMP runtime, which is not built for it.
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < workers; ++i) threads.emplace_back(body);
    body();
    for (std::thread& thread : threads) thread.join();
    return;
#endif
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body();
    });
  }
};

// What plans are made for.
inline Device device() { return {TorchExecutor().threads(), cpu::kernel_set().tiles != nullptr}; }

}  // namespace resona::ops
