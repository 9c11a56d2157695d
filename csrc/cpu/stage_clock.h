// Where the time of the CPU backend goes, for benchmarks: wall-clock seconds by stage, summed over threads.
//
// Off unless asked for; a scope then costs one relaxed load. Scopes stand around a task or a chunk, never
// around a row. A thread is in one stage at a time: what an inner scope takes is not the outer one's.
#pragma once

#include <atomic>
#include <string>

namespace resona::cpu {

enum class Stage { kNone, kPool, kSearch, kRescore, kIndex, kPack, kAttention, kMerge, kGradients, kCount };

extern std::atomic<bool> stage_clock_is_on;

// Charges the time since the last call on this thread to its stage; returns that stage.
Stage enter_stage(Stage next);

class StageScope {
 public:
  explicit StageScope(Stage stage) : is_on_(stage_clock_is_on.load(std::memory_order_relaxed)) {
    if (is_on_) outer_ = enter_stage(stage);
  }
  ~StageScope() {
    if (is_on_) enter_stage(outer_);
  }
  StageScope(const StageScope&) = delete;
  StageScope& operator=(const StageScope&) = delete;

 private:
  const bool is_on_;
  Stage outer_ = Stage::kNone;
};

// {"pool": 0.25, ...}: seconds since the last reading. Then counts from zero, or not at all.
std::string read_stage_clock(bool go_on);

}  // namespace resona::cpu
