// Barriers, __syncwarp, fences, atomics and programmatic dependent launch: the operations that order memory.
#include <cstring>

#include "state.h"

namespace simt {
namespace {

// What this thread did so far can be known to others; what it does next is something new.
void tick(Thread& thread) { ++thread.clock.own[thread.number]; }

unsigned wanted(const Block& block, const Barrier& barrier) {
  return barrier.threads == kWholeBlock ? block.live : barrier.threads;
}

void complete(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    thread->votes = barrier.votes;
    if (tracking) {
      thread->clock.join(barrier.gathered);
      tick(*thread);
    }
    wake(*thread);
  }
  barrier = Barrier();
}

}  // namespace

Votes barrier(const char* op, unsigned id, unsigned threads, bool waits, int predicate, Site site) {
  note(op, site);
  Thread& me = *machine.current;
  Block& block = *me.block;
  if (id >= kBarriers) fail(std::string(op) + ": barrier " + std::to_string(id) + " of 16");
  if (threads % kWarpSize) fail(std::string(op) + ": " + std::to_string(threads) + " is not whole warps");
  Barrier& b = block.barriers[id];
  if (b.arrived > 0 && b.threads != threads)
    fail(std::string(op) + " at " + describe(site) + ": barrier " + std::to_string(id) + " expects " +
         std::to_string(b.threads) + " threads elsewhere and " + std::to_string(threads) + " here");
  const auto [first, is_first] = b.sites.try_emplace(me.warp->number, site);
  if (!is_first && first->second.line != site.line)
    fail(std::string(op) + " at " + describe(site) + ": divergent barrier, lanes of this warp wait at " +
         describe(first->second));
  b.threads = threads;
  ++b.arrived;
  b.votes.count += predicate != 0;
  b.votes.any |= predicate != 0;
  b.votes.all &= predicate != 0;
  if (tracking) {
    b.gathered.block = block.id;
    b.gathered.join(me.clock);
    tick(me);
  }
  if (waits) b.waiting.push_back(&me);
  const bool last = b.arrived >= wanted(block, b);
  if (last) complete(b);
  if (waits && !last)
    block_current();
  else
    yield();
  return me.votes;
}

void thread_exits(Thread& me) {
  Block& block = *me.block;
  const unsigned bit = 1u << me.lane;
  me.done = true;
  me.warp->live &= ~bit;
  me.warp->ready &= ~bit;
  --block.live;
  drop_copies(me);
  for (Barrier& b : block.barriers)
    if (b.arrived > 0 && b.threads == kWholeBlock && b.arrived >= block.live) complete(b);
}

void fence(Scope scope, Site site) {
  note(scope == Scope::kDevice ? "__threadfence" : "__threadfence_block", site);
  Thread& me = *machine.current;
  if (!tracking || scope == Scope::kBlock) return;
  if (me.has_pending) me.clock.join(me.pending);
  me.pending.clear();
  me.has_pending = false;
  me.released = me.clock;
  me.has_released = true;
  tick(me);
}

namespace {

// An atomic read of what others released at this address; relaxed ones count from the next fence on.
void acquire(Thread& me, const void* address, Order order, Scope scope) {
  const auto found = machine.synchronised.find(address);
  if (found == machine.synchronised.end() || scope == Scope::kBlock) return;
  if (order == Order::kAcquire || order == Order::kAcquireRelease) {
    me.clock.join(found->second);
    return;
  }
  me.pending.block = me.block->id;
  me.pending.join(found->second);
  me.has_pending = true;
}

// `continues`: a read-modify-write carries on what was released at the address before it.
void release(Thread& me, const void* address, Order order, Scope scope, bool continues) {
  if (!continues) machine.synchronised.erase(address);
  if (scope == Scope::kBlock) return;
  const bool strong = order == Order::kRelease || order == Order::kAcquireRelease;
  if (!strong && !me.has_released) return;
  Clock& there = machine.synchronised.try_emplace(address).first->second;
  if (there.own.empty()) there.block = me.block->id;
  there.join(strong ? me.clock : me.released);
  tick(me);
}

uint64_t fetch(const void* address, size_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, address, bytes);
  return value;
}

uint32_t add_float(uint64_t a, uint64_t b) {
  const uint32_t bits[2] = {static_cast<uint32_t>(a), static_cast<uint32_t>(b)};
  float values[2];
  std::memcpy(values, bits, sizeof values);
  const float sum = values[0] + values[1];
  uint32_t result;
  std::memcpy(&result, &sum, sizeof result);
  return result;
}

uint64_t combine(Atomic kind, uint64_t old, uint64_t operand, uint64_t compare) {
  switch (kind) {
    case Atomic::kAdd:
      return old + operand;
    case Atomic::kMin:
      return std::min(old, operand);
    case Atomic::kMax:
      return std::max(old, operand);
    case Atomic::kOr:
      return old | operand;
    case Atomic::kAddFloat:
      return add_float(old, operand);
    case Atomic::kCompareSwap:
      return old == compare ? operand : old;
    default:
      return operand;
  }
}

}  // namespace

uint64_t atomic(const char* op, Atomic kind, void* address, size_t bytes, uint64_t operand, uint64_t compare,
                Order order, Scope scope, Site site) {
  note(op, site);
  touch(op, address, bytes, bytes, Access::kAtomicWrite, Space::kAny, site);
  Thread& me = *machine.current;
  const uint64_t old = fetch(address, bytes), value = combine(kind, old, operand, compare);
  std::memcpy(address, &value, bytes);
  if (tracking) {
    acquire(me, address, order, scope);
    release(me, address, order, scope, true);
  }
  if (fetch(address, bytes) == old)
    poll();
  else
    yield();
  return old;
}

uint64_t atomic_load(const char* op, const void* address, size_t bytes, Order order, Scope scope, Site site) {
  note(op, site);
  poll();  // before the load: whoever spins on the value sees the latest
  touch(op, address, bytes, bytes, Access::kAtomicRead, Space::kAny, site);
  if (tracking) acquire(*machine.current, address, order, scope);
  return fetch(address, bytes);
}

void atomic_store(const char* op, void* address, size_t bytes, uint64_t value, Order order, Scope scope,
                  Site site) {
  note(op, site);
  touch(op, address, bytes, bytes, Access::kAtomicWrite, Space::kAny, site);
  if (tracking) release(*machine.current, address, order, scope, false);
  std::memcpy(address, &value, bytes);
  yield();
}

void nap(Site site) {
  note("nanosleep", site);
  poll();
}

void launch_dependents(Site site) {
  note("griddepcontrol_launch_dependents", site);
  Block& block = *machine.current->block;
  if (block.triggered) return;
  block.triggered = true;
  if (++block.kernel->triggered == block.kernel->blocks()) to_host();
}

void wait_for_primary(Site site) {
  note("griddepcontrol_wait", site);
  Thread& me = *machine.current;
  Kernel& kernel = *me.block->kernel;
  me.block->waited = true;
  if (kernel.number == 0 || !kernel.config.dependent) return;
  if (!machine.kernels[kernel.number - 1].complete()) {
    machine.waiting_for_primary.push_back(&me);
    block_current();
  }
  me.clock.kernels_done = kernel.number;
}

}  // namespace simt
