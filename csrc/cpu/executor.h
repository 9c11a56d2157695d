// Threads, as the backend sees them: the caller hands in a way to run a function on several workers.
// Tasks are drawn from a counter, large ones first, so uneven (causal) work stays balanced. A task owns
// what it writes, hence results do not depend on the number of workers or on who runs what.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace resona::cpu {

class Executor {
 public:
  virtual ~Executor() = default;
  virtual int64_t threads() const = 0;
  // Calls body() `workers` times, at the same time where possible.
  virtual void run(int64_t workers, const std::function<void()>& body) const = 0;
};

// The caller's own thread, for work too small for several.
class Caller final : public Executor {
 public:
  int64_t threads() const override { return 1; }
  void run(int64_t, const std::function<void()>& body) const override { body(); }
};

// Calls task(scratch, i) for i = tasks - 1 ... 0; make_scratch() is called once per worker.
template <class MakeScratch, class Task>
void for_each_task(const Executor& executor, int64_t tasks, const MakeScratch& make_scratch,
                   const Task& task) {
  if (tasks == 0) return;
  std::atomic<int64_t> remaining{tasks};
  std::exception_ptr error;
  std::mutex error_mutex;
  executor.run(std::min(executor.threads(), tasks), [&] {
    try {
      auto scratch = make_scratch();
      for (int64_t i; (i = remaining.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;) task(scratch, i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace resona::cpu
