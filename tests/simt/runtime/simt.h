// The simulator as kernels' host twins and test runners see it. Everything here is implemented in .cpp
// files that no sanitizer instruments: what a twin does on behalf of the hardware is not an access of the
// kernel, and the runtime checks it itself.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// Where the kernel called a twin; a default argument of every twin.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- launching: runners call launch() as often as they like; the queue runs when the runner returns

struct LaunchConfig {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool dependent = false;  // programmatic dependent launch on the kernel before it
};

using Body = void (*)(void* closure);
void enqueue(const LaunchConfig& config, const void* closure, size_t bytes, Body body);

// `body` calls the kernel; it is copied, and like kernel parameters it may hold plain data only.
template <class F>
void launch(const LaunchConfig& config, const F& body) {
  static_assert(__is_trivially_copyable(F), "kernel parameters are plain data");
  enqueue(config, &body, sizeof(F), [](void* closure) { (*static_cast<const F*>(closure))(); });
}

// ---- who am I

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();

// ---- shared memory

void* dynamic_shared(Site site);
void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name, Site site);

template <class T>
T& static_shared_as(const char* name, Site site) {
  static const char key = 0;  // one address per type; the site tells two variables of a type apart
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T), name, site));
}

// ---- synchronisation

struct Votes {
  int count, any, all;  // of the predicates of the threads that took part
};

constexpr unsigned kWholeBlock = 0;  // a barrier for every thread that has not exited
Votes barrier(const char* op, unsigned id, unsigned threads, bool waits, int predicate, Site site);

void sync_warp(unsigned mask, Site site);

enum class Shuffle { kIndex, kUp, kDown, kXor };
void shuffle(Shuffle kind, unsigned mask, void* value, size_t bytes, int lane, int width, Site site);

struct Vote {
  unsigned ballot;  // lanes whose predicate holds
  unsigned lanes;   // lanes that took part
};
Vote vote(const char* op, unsigned mask, bool predicate, Site site);
unsigned match_any(unsigned mask, uint64_t value, Site site);
unsigned active_mask();

enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint32_t reduce(Reduce kind, bool is_signed, unsigned mask, uint32_t value, Site site);

// ---- memory operations that a plain load or store does not express

enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };
enum class Scope { kBlock, kDevice };
enum class Atomic { kAdd, kMin, kMax, kExchange, kCompareSwap, kAddFloat, kOr };

// Performs the operation on 4 or 8 bytes and returns the old value.
uint64_t atomic(const char* op, Atomic kind, void* address, size_t bytes, uint64_t operand, uint64_t compare,
                Order order, Scope scope, Site site);
uint64_t atomic_load(const char* op, const void* address, size_t bytes, Order order, Scope scope, Site site);
void atomic_store(const char* op, void* address, size_t bytes, uint64_t value, Order order, Scope scope,
                  Site site);
void fence(Scope scope, Site site);
void nap(Site site);  // nanosleep: lets everyone else run

// A vector load or store by name: checked for alignment and bounds in every build.
void load(const char* op, void* to, const void* from, size_t bytes, Site site);
void store(const char* op, void* to, const void* from, size_t bytes, Site site);

// cp.async: `source_bytes` are copied, the rest of `bytes` is zero-filled.
void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes, Site site);
void copy_commit(Site site);
void copy_wait(unsigned newer_groups, Site site);  // all but the newest groups have landed
void copy_wait_all(Site site);

// ---- matrix instructions

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Site site);
void stmatrix(const uint32_t* registers, int matrices, bool transposed, void* row, Site site);

enum class Multiply { kBFloat16, kHalf, kTF32 };  // m16n8k16, m16n8k16, m16n8k8
void mma(Multiply kind, float* c, const uint32_t* a, const uint32_t* b, Site site);

// ---- programmatic dependent launch

void launch_dependents(Site site);
void wait_for_primary(Site site);

}  // namespace simt
