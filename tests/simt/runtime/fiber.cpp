#include "fiber.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

// Present when the process runs under AddressSanitizer.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}

#if !defined(SIMT_USES_UCONTEXT)
// Saves the callee-saved registers on the old stack, changes stacks and restores them from the new one.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");
#endif

namespace simt {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kSlotBytes = kStackBytes + kGuardBytes;

char* map_pages(size_t bytes) {
  void* pages =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::runtime_error("simt: no memory for the stacks of fibers");
  return static_cast<char*>(pages);
}

char* stacks() {
  static char* const arena = map_pages(kMaxFibers * kSlotBytes);
  return arena;
}

size_t guarded = 0;  // stacks that have their guard page

Context* left;  // the context that was switched from last

}  // namespace

char* stack_of_slot(size_t slot) {
  if (slot >= kMaxFibers) throw std::runtime_error("simt: too many threads resident at once");
  for (; guarded <= slot; ++guarded)
    if (mprotect(stacks() + guarded * kSlotBytes, kGuardBytes, PROT_NONE) != 0)
      throw std::runtime_error("simt: no guard page below the stack of a fiber: too many mappings");
  return stacks() + slot * kSlotBytes + kGuardBytes;
}

void release_stacks() {
  mprotect(stacks(), kMaxFibers * kSlotBytes, PROT_READ | PROT_WRITE);
  madvise(stacks(), kMaxFibers * kSlotBytes, MADV_DONTNEED);
  guarded = 0;
}

bool is_stack_address(const void* address) {
  const char* byte = static_cast<const char*>(address);
  return byte >= stacks() && byte < stacks() + kMaxFibers * kSlotBytes;
}

bool under_address_sanitizer() { return __asan_poison_memory_region != nullptr; }

void poison(const void* address, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(address, bytes);
}

void unpoison(const void* address, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(address, bytes);
}

void prepare(Context& context, char* stack, void (*entry)()) {
  unpoison(stack, kStackBytes);  // an abandoned fiber leaves red zones behind
  context.stack = stack;
  context.stack_bytes = kStackBytes;
  context.fake_stack = nullptr;
#if defined(SIMT_USES_UCONTEXT)
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = kStackBytes;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
#else
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the return address of `entry`: the end for unwinders, and the alignment of a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

void switch_context(Context& from, Context& to, bool from_ends) {
  left = &from;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#if defined(SIMT_USES_UCONTEXT)
  swapcontext(&from.machine, &to.machine);
#else
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(from.fake_stack, &left->stack, &left->stack_bytes);
}

void entered() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &left->stack, &left->stack_bytes);
}

namespace {

void (*on_fault)(const void*);
const void* fault_address;
char* spare_stack;
struct sigaction previous_segv, previous_bus;
stack_t previous_stack;

void report_fault() { on_fault(fault_address); }

// Returns into report_fault() on a stack of its own: the faulting one may be full.
void handle_fault(int, siginfo_t* info, void* machine) {
#if defined(__x86_64__) && defined(__linux__)
  fault_address = info->si_addr;
  auto& registers = static_cast<ucontext_t*>(machine)->uc_mcontext.gregs;
  registers[REG_RSP] = reinterpret_cast<greg_t>(spare_stack + kStackBytes - 8);  // as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report_fault);
#else
  (void)info, (void)machine;
  abort();
#endif
}

}  // namespace

FaultHandler::FaultHandler(void (*report)(const void*)) {
  static char* const signal_stack = map_pages(kStackBytes);
  if (!spare_stack) spare_stack = map_pages(kStackBytes);
  on_fault = report;
  if (under_address_sanitizer()) return;
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = kStackBytes;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = handle_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
}

FaultHandler::~FaultHandler() {
  if (under_address_sanitizer()) return;
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace simt
