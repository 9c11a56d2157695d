// The race build compiles kernels with -fsanitize=thread, which calls one of these functions before every
// access to memory. ThreadSanitizer's own runtime is not linked: it knows threads, not blocks, warps and
// asynchronous copies, and keeps few accesses per word. These functions hand each access to memory.cpp.
#include "state.h"

namespace {

inline void hook(const void* address, size_t bytes, simt::Access access, const void* program_counter) {
  if (simt::machine.current) simt::touch_plain(address, bytes, access, program_counter);
}

}  // namespace

#define HOOK(name, bytes, access) \
  void name(void* address) { hook(address, bytes, simt::Access::access, __builtin_return_address(0)); }
#define HOOKS_OF_SIZE(bytes)                       \
  HOOK(__tsan_read##bytes, bytes, kRead)           \
  HOOK(__tsan_write##bytes, bytes, kWrite)         \
  HOOK(__tsan_unaligned_read##bytes, bytes, kRead) \
  HOOK(__tsan_unaligned_write##bytes, bytes, kWrite)

extern "C" {

void __tsan_init() { simt::tracking = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)

void __tsan_read_range(void* address, size_t bytes) {
  hook(address, bytes, simt::Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  hook(address, bytes, simt::Access::kWrite, __builtin_return_address(0));
}

}  // extern "C"
