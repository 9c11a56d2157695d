// Two accesses of a byte race if one of them writes and neither is known to the other's thread as past.
// Barriers, __syncwarp, fences with atomics, and the ends of kernels make the past known (sync.cpp);
// shuffles and the like do not.
#include "race.h"

#include <cstdio>

namespace simt {
namespace {

std::vector<Site>& sites() {
  static std::vector<Site> all{{"", 0}};
  return all;
}

bool is_atomic(Access access) { return access == Access::kAtomicRead || access == Access::kAtomicWrite; }

bool is_past(Epoch epoch, const Thread& thread) {
  if (epoch == 0) return true;
  if (machine.kernel_of_block[block_of(epoch)] < thread.clock.kernels_done) return true;
  return thread.clock.knows(epoch & ~kAtomicBit);
}

struct Event {
  Thread& thread;
  Epoch epoch;
  Access access;
  uint32_t place;
};

std::string describe_byte(const Region& region, size_t offset) {
  return "byte " + std::to_string(offset) + " of '" + region.name + "'";
}

[[noreturn]] void fail_race(const Event& now, const Region& region, size_t offset, Epoch before,
                            const char* did, uint32_t place) {
  const unsigned block = block_of(before);
  fail("race: " + std::string(verb(now.access)) + " " + describe_byte(region, offset) + " at " +
       describe_place(now.place) + ", which thread " + std::to_string(thread_of(before)) +
       (block == now.thread.block->id ? "" : " of another block") + " " + did + " at " +
       describe_place(place) + "; nothing orders the two");
}

void remember_read(Cell& cell, const Event& now) {
  if (cell.read == now.epoch) return;
  if (!cell.more_reads && is_past(cell.read, now.thread)) {
    cell.read = now.epoch;
    cell.read_place = now.place;
    return;
  }
  if (!cell.more_reads) cell.more_reads = new std::vector<std::pair<Epoch, uint32_t>>;
  for (auto& [epoch, place] : *cell.more_reads) {
    if (block_of(epoch) != block_of(now.epoch) || thread_of(epoch) != thread_of(now.epoch)) continue;
    epoch = now.epoch, place = now.place;
    return;
  }
  cell.more_reads->emplace_back(now.epoch, now.place);
}

void check_reads(const Cell& cell, const Event& now, const Region& region, size_t offset) {
  const auto check = [&](Epoch read, uint32_t place) {
    const bool both_atomic = is_atomic(now.access) && (read & kAtomicBit);
    if (!both_atomic && !is_past(read, now.thread)) fail_race(now, region, offset, read, "reads", place);
  };
  check(cell.read, cell.read_place);
  if (!cell.more_reads) return;
  for (const auto& [epoch, place] : *cell.more_reads) check(epoch, place);
}

void track_bytes(const Event& now, Region& region, size_t offset, size_t bytes) {
  for (; bytes > 0; ++offset, --bytes) {
    Cell& cell = region.cells[offset];
    if (cell.in_flight)
      fail(std::string(verb(now.access)) + " " + describe_byte(region, offset) + " at " +
           describe_place(now.place) + " while the cp.async from " + describe_place(cell.write_place) +
           " is in flight: no wait stands between");
    const bool both_atomic = is_atomic(now.access) && (cell.write & kAtomicBit);
    if (!both_atomic && !is_past(cell.write, now.thread))
      fail_race(now, region, offset, cell.write, "writes", cell.write_place);
    if (now.access != Access::kWrite && !cell.initialised)
      fail("reads " + describe_byte(region, offset) + " at " + describe_place(now.place) +
           ", which nobody has written (uninitialised)");
    if (!writes(now.access)) {
      remember_read(cell, now);
      continue;
    }
    check_reads(cell, now, region, offset);
    cell.write = now.epoch;
    cell.write_place = now.place;
    cell.read = 0;
    delete cell.more_reads;
    cell.more_reads = nullptr;
    cell.initialised = true;
  }
}

Epoch epoch_of(const Thread& thread, Access access) {
  const Epoch now = make_epoch(thread.block->id, thread.number, thread.clock.own[thread.number]);
  return is_atomic(access) ? now | kAtomicBit : now;
}

}  // namespace

Place place_of(Site site) {
  static std::map<std::pair<const void*, int>, uint32_t> numbers;
  const auto [found, is_new] =
      numbers.try_emplace({site.file, site.line}, static_cast<uint32_t>(sites().size()));
  if (is_new) sites().push_back(site);
  return found->second;
}

std::string describe_place(Place place) {
  if (place & kCounterBit) {
    char text[32];
    snprintf(text, sizeof text, "{pc:%x}", place & ~kCounterBit);
    return text;
  }
  return describe(sites()[place]);
}

const char* verb(Access access) {
  switch (access) {
    case Access::kRead:
      return "reads";
    case Access::kWrite:
      return "writes";
    default:
      return "atomically accesses";
  }
}

void track(Region& region, const void* address, size_t bytes, Access access, Place place) {
  Thread& me = *machine.current;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - region.begin);
  track_bytes({me, epoch_of(me, access), access, place}, region, offset, bytes);
}

void set_in_flight(const void* address, size_t bytes, bool in_flight, Site site) {
  if (!tracking) return;
  Region& region = *find(machine.current->block->shared, static_cast<const char*>(address));
  const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - region.begin);
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = region.cells[i];
    cell.in_flight = in_flight;
    cell.write = epoch_of(*machine.current, Access::kWrite);
    cell.write_place = place_of(site);
  }
}

}  // namespace simt
