// Who runs next. Threads run until they wait, so a schedule is the order in which ready threads are picked:
//
//   lockstep   every thread in turn, ascending: all warps advance together
//   reversed   the same, descending
//   run-ahead  the first ready warp of a fixed order runs until it must wait for another warp
//   shuffle    any ready lane of any ready warp
#include <cstdio>
#include <numeric>

#include "launches.h"
#include "run.h"
#include "state.h"

namespace simt {

Machine machine;
bool tracking = false;  // set by a constructor of the kernels' objects, so it must have none itself

namespace {

struct Cursor {
  size_t warp = 0;
  unsigned lane = kWarpSize - 1;
} cursor;

unsigned lowest(unsigned mask) { return static_cast<unsigned>(__builtin_ctz(mask)); }
unsigned highest(unsigned mask) { return 31u - static_cast<unsigned>(__builtin_clz(mask)); }

Thread* pick_in_turn(bool descending) {
  const size_t count = machine.warps.size();
  for (size_t step = 0; step <= count; ++step) {
    const size_t at = (cursor.warp + (descending ? (count - step % count) : step)) % count;
    unsigned ready = machine.warps[at]->ready;
    if (step == 0) {
      const unsigned below = (1u << cursor.lane) - 1;
      ready &= descending ? below : ~(below | 1u << cursor.lane);
    }
    if (!ready) continue;
    cursor = {at, descending ? highest(ready) : lowest(ready)};
    return machine.warps[at]->lanes[cursor.lane];
  }
  return nullptr;
}

Thread* pick_run_ahead() {
  for (Warp* warp : machine.warps)
    if (warp->ready) return warp->lanes[lowest(warp->ready)];
  return nullptr;
}

Thread* pick_any() {
  const size_t count = machine.warps.size(), first = random() % count;
  for (size_t step = 0; step < count; ++step) {
    Warp* warp = machine.warps[(first + step) % count];
    if (!warp->ready) continue;
    unsigned ready = warp->ready;
    for (unsigned skip = random() % __builtin_popcount(ready); skip > 0; --skip) ready &= ready - 1;
    return warp->lanes[lowest(ready)];
  }
  return nullptr;
}

Thread* pick() {
  if (machine.warps.empty()) return nullptr;
  cursor.warp %= machine.warps.size();
  switch (machine.options.schedule) {
    case Schedule::kLockstep:
      return pick_in_turn(false);
    case Schedule::kReversed:
      return pick_in_turn(true);
    case Schedule::kRunAhead:
      return pick_run_ahead();
    default:
      return pick_any();
  }
}

void run_thread(Thread* next, bool from_ends = false) {
  Thread* me = machine.current;
  if (next == me) return;
  ++machine.switches;
  machine.current = next;
  switch_context(me ? me->context : machine.host, next ? next->context : machine.host, from_ends);
}

void shuffle_order(std::vector<unsigned>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
}

void thread_main() {
  entered();
  Thread& me = *machine.current;
  Kernel& kernel = *me.block->kernel;
  kernel.body(kernel.closure.data());
  thread_exits(me);
  run_thread(me.block->live == 0 ? nullptr : pick(), true);
  __builtin_unreachable();
}

void start_threads(Block& block) {
  const dim3 size = block.kernel->config.block;
  const unsigned count = size.x * size.y * size.z;
  block.threads.resize(count);
  block.warps.resize((count + kWarpSize - 1) / kWarpSize);
  block.live = count;
  // Two kernels at most are under way; each has one half of the stacks and of the shared memory.
  const unsigned half = block.kernel->number % 2;
  const size_t first_stack = half * kMaxFibers / 2 + block.slot * block.warps.size() * kWarpSize;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.warp = &block.warps[i / kWarpSize];
    t.number = i, t.lane = i % kWarpSize;
    t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.warp->block = &block;
    t.warp->number = i / kWarpSize;
    t.warp->lanes[t.lane] = &t;
    t.warp->live = t.warp->ready |= 1u << t.lane;
    t.stack = stack_of_slot(first_stack + i);
    prepare(t.context, t.stack, thread_main);
    if (!tracking) continue;
    t.clock.block = block.id;
    t.clock.own.assign(count, 0);
    t.clock.own[i] = 1;
    const unsigned number = block.kernel->number;
    t.clock.kernels_done = block.kernel->config.dependent && number > 0 ? number - 1 : number;
  }
}

void rebuild_warps() {
  machine.warps.clear();
  for (const auto& block : machine.blocks)
    for (Warp& warp : block->warps) machine.warps.push_back(&warp);
  // The run-ahead order: who is favoured differs from seed to seed, and seed 0 favours the last.
  if (machine.options.schedule != Schedule::kRunAhead) return;
  std::reverse(machine.warps.begin(), machine.warps.end());
  for (size_t i = machine.warps.size(); machine.options.seed > 0 && i > 1; --i)
    std::swap(machine.warps[i - 1], machine.warps[random() % i]);
}

size_t free_slot(const Kernel& kernel) {
  for (size_t slot = 0;; ++slot) {
    bool taken = false;
    for (const auto& block : machine.blocks) taken |= block->kernel == &kernel && block->slot == slot;
    if (!taken) return slot;
  }
}

// The kernels that may have blocks resident: the first unfinished one, and a dependent one behind it.
bool may_start(const Kernel& kernel) {
  if (kernel.number == 0) return true;
  const Kernel& primary = machine.kernels[kernel.number - 1];
  if (primary.complete()) return true;
  const bool is_first = kernel.number < 2 || machine.kernels[kernel.number - 2].complete();
  return is_first && kernel.config.dependent && primary.triggered == primary.blocks();
}

bool admit() {
  bool any = false;
  for (Kernel& kernel : machine.kernels) {
    if (!may_start(kernel)) break;
    while (kernel.next < kernel.blocks() && kernel.resident < kernel.max_resident) {
      auto block = std::make_unique<Block>();
      const unsigned number = kernel.order[kernel.next++];
      const dim3 grid = kernel.config.grid;
      block->kernel = &kernel;
      block->id = static_cast<unsigned>(machine.kernel_of_block.size());
      block->index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
      block->slot = free_slot(kernel);
      machine.kernel_of_block.push_back(kernel.number);
      create_shared(*block);
      start_threads(*block);
      ++kernel.resident;
      machine.blocks.push_back(std::move(block));
      any = true;
    }
  }
  if (any) rebuild_warps();
  return any;
}

void reap() {
  bool any = false;
  for (auto& block : machine.blocks) {
    if (block->live > 0) continue;
    Kernel& kernel = *block->kernel;
    destroy_shared(*block);
    if (kernel.config.dependent && !block->waited && kernel.number > 0)
      throw Error(std::string("kernel '") + kernel.config.name +
                  "': launched as a dependent, but a block ended without griddepcontrol_wait, so kernels "
                  "behind it would not know that the ones before it have ended");
    ++kernel.finished;
    --kernel.resident;
    if (!block->triggered) ++kernel.triggered;
    block.reset();
    any = true;
  }
  if (!any) return;
  auto& blocks = machine.blocks;
  blocks.erase(std::remove(blocks.begin(), blocks.end(), nullptr), blocks.end());
  rebuild_warps();
  for (Thread*& waiting : machine.waiting_for_primary) {
    if (!machine.kernels[waiting->block->kernel->number - 1].complete()) continue;
    wake(*waiting);
    waiting = nullptr;
  }
  auto& waiting = machine.waiting_for_primary;
  waiting.erase(std::remove(waiting.begin(), waiting.end(), nullptr), waiting.end());
}

void run_queue() {
  for (;;) {
    reap();
    admit();
    Thread* next = pick();
    if (!next) {
      if (machine.blocks.empty()) return;
      throw Error(deadlock_report());
    }
    run_thread(next);
    if (machine.failed) throw Error(machine.error);
  }
}

}  // namespace

uint64_t random() {  // xorshift64*
  uint64_t& x = machine.random_state;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return (x * 0x2545F4914F6CDD1Dull) >> 32;
}

void note(const char* op, Site site, unsigned mask) {
  if (!machine.current) throw Error(std::string(op) + ": called outside a kernel");
  machine.current->op = op;
  machine.current->site = site;
  machine.current->mask = mask;
}

void wake(Thread& thread) {
  thread.warp->ready |= 1u << thread.lane;
  machine.idle = 0;
}

void block_current() {
  Thread& me = *machine.current;
  me.warp->ready &= ~(1u << me.lane);
  run_thread(pick());
}

void yield() {
  machine.idle = 0;
  run_thread(pick());
}

void poll() {
  constexpr uint64_t kPatience = 200000;
  if (++machine.idle > kPatience) fail("spins, and so does everyone else who can run\n" + deadlock_report());
  if (machine.options.schedule == Schedule::kRunAhead) {  // the spinning warp goes to the end of the order
    auto& warps = machine.warps;
    const auto at = std::find(warps.begin(), warps.end(), machine.current->warp);
    std::rotate(at, at + 1, warps.end());
    // Its other lanes come first, should they be able to help.
    unsigned& ready = machine.current->warp->ready;
    const unsigned bit = 1u << machine.current->lane, others = ready & ~bit;
    if (others) return run_thread(machine.current->warp->lanes[lowest(others)]);
  }
  run_thread(pick());
}

void to_host() { run_thread(nullptr); }

void enqueue(const LaunchConfig& config, const void* closure, size_t bytes, Body body) {
  const unsigned threads = config.block.x * config.block.y * config.block.z;
  const uint64_t blocks = uint64_t(config.grid.x) * config.grid.y * config.grid.z;
  const std::string name = std::string("launch of '") + config.name + "': ";
  if (threads == 0 || threads > 1024)
    throw Error(name + "expected 1 to 1024 threads per block, got " + std::to_string(threads));
  if (blocks == 0) throw Error(name + "empty grid");
  if (blocks > 1 << 20) throw Error(name + "more blocks than the simulator runs: " + std::to_string(blocks));
  Kernel& kernel = machine.kernels.emplace_back();
  kernel.config = config;
  kernel.body = body;
  kernel.closure.assign(static_cast<const char*>(closure), static_cast<const char*>(closure) + bytes);
  kernel.number = static_cast<unsigned>(machine.kernels.size() - 1);
  kernel.order.resize(blocks);
  std::iota(kernel.order.begin(), kernel.order.end(), 0u);
  if (machine.options.schedule == Schedule::kReversed)
    std::reverse(kernel.order.begin(), kernel.order.end());
  else if (machine.options.seed > 0)
    shuffle_order(kernel.order);
  const size_t whole_warps = (threads + kWarpSize - 1) / kWarpSize * kWarpSize;
  const unsigned fit = static_cast<unsigned>(std::min<size_t>(kMaxResident, kMaxFibers / 2 / whole_warps));
  kernel.max_resident = machine.options.resident == 0 ? fit : std::min(machine.options.resident, fit);
}

int64_t launches_so_far() { return static_cast<int64_t>(machine.kernels.size()); }

void run(Runner runner, const Arguments& arguments, const Options& options, std::deque<Region> global) {
  struct Cleanup {  // whatever happened, the next run begins afresh
    ~Cleanup() { machine = Machine(); }
  } cleanup;
  machine.options = options;
  machine.random_state = options.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  machine.global = std::move(global);
  cursor = Cursor();
  runner(arguments);
  const FaultHandler faults([](const void* address) {
    char text[64];
    snprintf(text, sizeof text, "faults at address %p", address);
    fail(text);
  });
  run_queue();
}

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
dim3 block_size() { return machine.current->block->kernel->config.block; }
dim3 grid_size() { return machine.current->block->kernel->config.grid; }

std::map<std::string, Runner>& runners() {
  static std::map<std::string, Runner> all;
  return all;
}

}  // namespace simt
