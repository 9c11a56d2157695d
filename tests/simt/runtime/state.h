// The state of a simulated launch: kernels hold blocks, blocks hold warps, warps hold threads (fibers).
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "fiber.h"
#include "simt.h"

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kBarriers = 16;
constexpr size_t kMaxResident = 16;  // blocks of one kernel

enum class Schedule { kLockstep, kReversed, kRunAhead, kShuffle };

struct Options {
  Schedule schedule = Schedule::kLockstep;
  bool copies_land_early = false;   // cp.async lands when issued, or when waited for
  bool truncated_products = false;  // mma sums as tensor cores do: aligned and cut off, not rounded
  unsigned resident = 1;            // blocks of a kernel that run at once; 0: as many as fit
  uint64_t seed = 0;                // for kShuffle, the order of blocks and of warps
};

struct Block;
struct Kernel;
struct Warp;

// An asynchronous copy in flight.
struct Copy {
  char* shared;
  const char* global;
  size_t bytes, source_bytes;
  unsigned group;
  Site site;
};

struct Thread {
  Context context;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned number = 0, lane = 0;
  uint3 index{};
  bool done = false;

  // The last operation, for reports.
  const char* op = "its first instruction";
  Site site{"", 0};
  unsigned mask = 0;

  Votes votes{};  // result of the last barrier
  std::vector<Copy> copies;
  unsigned copy_group = 0;

  Clock clock;     // what this thread knows to have happened; race build only
  Clock released;  // as of its last fence
  Clock pending;   // read by relaxed atomics, known from the next fence on
  bool has_released = false, has_pending = false;
};

// A warp operation for which some lanes still wait.
struct Collective {
  const char* op;
  unsigned mask, arrived;
  void* arguments[kWarpSize];
  Site site;
};

struct Warp {
  Block* block = nullptr;
  unsigned number = 0;
  unsigned live = 0, ready = 0;  // lanes
  Thread* lanes[kWarpSize] = {};
  std::vector<Collective> pending;
};

struct Barrier {
  unsigned threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Votes votes{0, 0, 1};
  Clock gathered;
  std::map<unsigned, Site> sites;  // by warp
};

// A piece of memory that the kernel may touch.
struct Region {
  char* begin = nullptr;
  size_t bytes = 0;
  std::string name;
  bool writable = true;
  std::vector<Cell> cells;  // one per byte; race build only, and only where something may be written
};

struct Block {
  Kernel* kernel = nullptr;
  unsigned id = 0;  // unique in a run
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  unsigned live = 0;
  bool triggered = false, waited = false;

  size_t slot = 0;  // which part of the arena of shared memory, which stacks
  std::deque<Region> shared;
  std::map<std::pair<const void*, int>, Region*> statics;
  char* shared_top = nullptr;  // where the next static variable goes
};

struct Kernel {
  LaunchConfig config;
  Body body;
  std::vector<char> closure;
  unsigned number = 0;          // in the queue
  std::vector<unsigned> order;  // of blocks
  size_t next = 0;              // in `order`
  unsigned finished = 0, triggered = 0;
  unsigned resident = 0, max_resident = 1;

  unsigned blocks() const { return static_cast<unsigned>(order.size()); }
  bool complete() const { return finished == blocks(); }
};

struct Machine {
  Options options;
  Context host;
  Thread* current = nullptr;
  std::deque<Kernel> kernels;
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  std::vector<Warp*> warps;                    // of resident blocks
  std::vector<Thread*> waiting_for_primary;
  std::vector<unsigned> kernel_of_block;      // by block id
  std::map<const void*, Clock> synchronised;  // what was released at an address
  std::deque<Region> global;
  bool failed = false;
  std::string error;
  uint64_t switches = 0, idle = 0;
  uint64_t random_state = 0;
};

extern Machine machine;
extern bool tracking;  // kernels were compiled for the race build

// scheduler.cpp
void note(const char* op, Site site, unsigned mask = 0);  // remembers the last operation of this thread
void wake(Thread& thread);
void block_current();  // runs others until somebody wakes this thread
void yield();          // runs others; this thread stays ready
void poll();           // the same, for a thread that waits for a value to change
void to_host();        // lets the host admit blocks
uint64_t random();

// report.cpp
[[noreturn]] void fail(const std::string& what);
std::string describe(const Thread& thread);
std::string describe(Site site);
std::string deadlock_report();

// sync.cpp
void thread_exits(Thread& thread);

// memory.cpp, shared.cpp, race.cpp
enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite };
enum class Space { kAny, kShared, kGlobal };
Region* find(std::deque<Region>& regions, const void* address);
std::string neighbourhood(const char* at);  // of an address that belongs to nobody
void create_shared(Block& block);
void destroy_shared(Block& block);  // looks for writes beyond the ends
// A checked access of the current thread by a named operation.
void touch(const char* op, const void* address, size_t bytes, size_t alignment, Access access, Space space,
           Site site);
// An access by compiled code; the race build reports every one.
void touch_plain(const void* address, size_t bytes, Access access, const void* program_counter);
// Bytes that a copy in flight will write, and has written.
void set_in_flight(const void* address, size_t bytes, bool in_flight, Site site);

// copies.cpp
void drop_copies(Thread& thread);

}  // namespace simt
