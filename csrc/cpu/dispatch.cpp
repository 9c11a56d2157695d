// Which kernels this processor runs. Decided once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace resona::cpu {
namespace {

struct Choice {
  const KernelSet* set;
  bool runs_here;
};

std::vector<Choice> choices() {
#if defined(RESONA_HAS_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return {{&avx512_kernels, avx512}, {&avx2_kernels, avx2}, {&portable_kernels, true}};
#else
  return {{&portable_kernels, true}};
#endif
}

const KernelSet& choose() {
  const char* wanted = std::getenv("RESONA_CPU_ISA");
  std::string usable;
  for (const Choice& choice : choices()) {
    if (!choice.runs_here) continue;
    if (wanted == nullptr || std::string(wanted) == choice.set->name) return *choice.set;
    usable += std::string(usable.empty() ? "" : ", ") + choice.set->name;
  }
  throw std::runtime_error("resona: RESONA_CPU_ISA: expected one of " + usable + " on this processor, got " +
                           wanted);
}

}  // namespace

const KernelSet& kernel_set() {
  static const KernelSet& set = choose();
  return set;
}

std::vector<std::string> runnable_instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices())
    if (choice.runs_here) names.push_back(choice.set->name);
  return names;
}

}  // namespace resona::cpu
