// What a failure says. Program counters appear as {pc:offset}; the Python side turns them into lines.
#include <cstring>
#include <map>
#include <tuple>

#include "run.h"
#include "state.h"

namespace simt {
namespace {

std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string describe_lanes(unsigned lanes) {
  if (lanes == ~0u) return "all lanes";
  std::string text;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    unsigned last = lane;
    while (last + 1 < kWarpSize && (lanes >> (last + 1) & 1)) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(lane);
    if (last > lane) text += "-" + std::to_string(last);
    lane = last;
  }
  return (text.find_first_of(",-") == std::string::npos ? "lane " : "lanes ") + text;
}

std::string describe_operation(const Thread& thread) {
  char mask[32] = "";
  if (thread.mask) snprintf(mask, sizeof mask, " mask %08x", thread.mask);
  return std::string(thread.op) + mask + (thread.site.line ? " at " + describe(thread.site) : "");
}

}  // namespace

std::string describe(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string describe(const Thread& thread) {
  return std::string("kernel '") + thread.block->kernel->config.name + "', block " +
         describe(thread.block->index) + ", thread " + std::to_string(thread.number) + " (warp " +
         std::to_string(thread.warp->number) + ", lane " + std::to_string(thread.lane) + ")";
}

std::string deadlock_report() {
  std::string text = "deadlock: no thread can go on. Each lane's last operation:";
  for (const auto& block : machine.blocks) {
    text += "\n  kernel '" + std::string(block->kernel->config.name) + "', block " + describe(block->index);
    for (const Warp& warp : block->warps) {
      std::map<std::string, unsigned> lanes;
      for (const Thread* thread : warp.lanes) {
        if (!thread) continue;
        const std::string last = describe_operation(*thread);
        lanes[thread->done ? "exited after " + last : "at " + last] |= 1u << thread->lane;
      }
      text += "\n    warp " + std::to_string(warp.number) + ":";
      const char* separator = " ";
      for (const auto& [what, which] : lanes) {
        text += separator + describe_lanes(which) + " " + what;
        separator = "; ";
      }
    }
  }
  return text;
}

void fail(const std::string& what) {
  if (!machine.current) throw Error(what);
  machine.error = describe(*machine.current) + ": " + what;
  machine.failed = true;
  to_host();
  __builtin_unreachable();
}

}  // namespace simt
