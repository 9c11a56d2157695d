// Stackful coroutines on one OS thread: a dozen instructions of assembly on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#define SIMT_USES_UCONTEXT 1
#endif

namespace simt {

struct Context {
#if defined(SIMT_USES_UCONTEXT)
  ucontext_t machine;
#else
  void* stack_pointer = nullptr;
#endif
  // For AddressSanitizer, which keeps the bounds of the stack that runs.
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kMaxFibers = 4096;

// Stack number `slot`, with a guard page below it. Stacks are reused.
char* stack_of_slot(size_t slot);

// Gives back memory and guard pages while nothing runs. A process has 65,530 mappings and every guard page
// costs two, so a session with dozens of builds would run out of them.
void release_stacks();
bool is_stack_address(const void* address);

void prepare(Context& context, char* stack, void (*entry)());
void switch_context(Context& from, Context& to, bool from_ends = false);
void entered();  // first call of a fiber's entry

bool under_address_sanitizer();
void poison(const void* address, size_t bytes);
void unpoison(const void* address, size_t bytes);

// While one of these lives, a fault (wild pointer, stack overflow) calls `report(address)` instead of
// ending the process. `report` must not return.
class FaultHandler {
 public:
  explicit FaultHandler(void (*report)(const void* address));
  ~FaultHandler();
};

}  // namespace simt
