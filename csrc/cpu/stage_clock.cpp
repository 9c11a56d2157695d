#include "cpu/stage_clock.h"

#include <array>
#include <chrono>
#include <cstdint>
#include <locale>
#include <sstream>

namespace resona::cpu {
namespace {

constexpr auto kStages = static_cast<size_t>(Stage::kCount);
constexpr std::array<const char*, kStages> kNames = {"",     "pool",      "search", "rescore",  "index",
                                                     "pack", "attention", "merge",  "gradients"};

std::array<std::atomic<int64_t>, kStages> totals;  // nanoseconds

struct ThreadClock {
  Stage stage = Stage::kNone;
  int64_t since = 0;
};
thread_local ThreadClock thread_clock;

int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

std::atomic<bool> stage_clock_is_on{false};

Stage enter_stage(Stage next) {
  const int64_t now = nanoseconds();
  const Stage before = thread_clock.stage;
  if (before != Stage::kNone)
    totals[static_cast<size_t>(before)].fetch_add(now - thread_clock.since, std::memory_order_relaxed);
  thread_clock = {next, now};
  return before;
}

std::string read_stage_clock(bool go_on) {
  stage_clock_is_on.store(go_on, std::memory_order_relaxed);
  std::ostringstream text;
  text.imbue(std::locale::classic());
  for (size_t stage = 1; stage < kStages; ++stage) {
    const auto total = static_cast<double>(totals[stage].exchange(0, std::memory_order_relaxed));
    text << (stage == 1 ? "{\"" : ", \"") << kNames[stage] << "\": " << total * 1e-9;
  }
  text << "}";
  return text.str();
}

}  // namespace resona::cpu
