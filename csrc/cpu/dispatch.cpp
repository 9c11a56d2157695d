// Which kernels this processor runs. Decided once, at the first call.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#if defined(RESONA_HAS_AMX_KERNELS) || defined(RESONA_HAS_BF16_KERNELS)
#include <cpuid.h>
#endif
#if defined(RESONA_HAS_AMX_KERNELS)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resona::cpu {
namespace {

struct Choice {
  KernelSet set;
  bool runs_here;
  bool pays_here = true;
};

#if defined(RESONA_HAS_AMX_KERNELS) || defined(RESONA_HAS_BF16_KERNELS)
bool has_vector_bf16() {
  constexpr unsigned kVectorBf16 = 1u << 5;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kVectorBf16) != 0;
}
#endif

#if defined(RESONA_HAS_AMX_KERNELS)
// Tiles exist, and Linux saves them on a context switch once the process has asked for that.
bool has_amx() {
#if defined(RESONA_EMULATED_TILES)
  return has_vector_bf16();  // tests/amx
#endif
  constexpr unsigned kTile = 1u << 24, kTileBf16 = 1u << 22;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kTileBf16) == 0) return false;
  if (!has_vector_bf16()) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<Choice> choices() {
  std::vector<Choice> all;
#if defined(RESONA_HAS_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(RESONA_HAS_AMX_KERNELS)
  all.push_back({{"amx", avx512_kernels.f32, avx512_kernels.f64, &amx_tiles}, avx512 && has_amx()});
#endif
#if defined(RESONA_HAS_BF16_KERNELS)
  // Measured, Gflop/s a core: AMD 230, in float32 118; Intel 76, in float32 148.
  all.push_back({{"avx512_bf16", avx512_kernels.f32, avx512_kernels.f64, &avx512_bf16_tiles},
                 avx512 && has_vector_bf16(),
                 __builtin_cpu_is("amd") != 0});
#endif
  all.push_back({avx512_kernels, avx512});
  all.push_back({avx2_kernels, avx2});
#endif
  all.push_back({portable_kernels, true});
  return all;
}

KernelSet choose() {
  const char* wanted = std::getenv("RESONA_CPU_ISA");
  std::string usable;
  for (const Choice& choice : choices()) {
    if (!choice.runs_here) continue;
    if (wanted == nullptr ? choice.pays_here : std::string(wanted) == choice.set.name) return choice.set;
    usable += std::string(usable.empty() ? "" : ", ") + choice.set.name;
  }
  throw std::runtime_error("resona: RESONA_CPU_ISA: expected one of " + usable + " on this processor, got " +
                           wanted);
}

}  // namespace

const KernelSet& kernel_set() {
  static const KernelSet set = choose();
  return set;
}

std::vector<std::string> runnable_instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices())
    if (choice.runs_here) names.push_back(choice.set.name);
  return names;
}

}  // namespace resona::cpu
