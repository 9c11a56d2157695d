// Where a kernel may read and write. Named operations are checked for bounds and alignment in every build;
// in the race build every access of the kernel's code comes here too (hooks.cpp), and on to race.cpp.
#include <dlfcn.h>
#include <link.h>

#include <cstring>

#include "race.h"
#include "run.h"

namespace simt {
namespace {

struct Image {
  const char *begin, *end;
};

// This shared library, with the constants of the kernels in it.
const Image& image() {
  static const Image found = [] {
    Image result{nullptr, nullptr};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          Image& result = *static_cast<Image*>(out);
          const char* base = reinterpret_cast<const char*>(info->dlpi_addr);
          const char *low = nullptr, *high = nullptr;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const char* begin = base + info->dlpi_phdr[i].p_vaddr;
            if (!low) low = begin;
            high = begin + info->dlpi_phdr[i].p_memsz;
          }
          const char* here = reinterpret_cast<const char*>(&machine);
          if (here < low || here >= high) return 0;
          result = {base, high};
          return 1;
        },
        &result);
    return result;
  }();
  return found;
}

// `what` makes the beginning of a report: most accesses need none.
template <class What>
Region& check_bounds(const void* address, size_t bytes, Access access, Space space, const What& what) {
  const char* at = static_cast<const char*>(address);
  Region* region = space == Space::kGlobal ? nullptr : find(machine.current->block->shared, at);
  if (!region && space != Space::kShared) region = find(machine.global, at);
  if (!region || at + bytes > region->begin + region->bytes)
    fail(what() + ": out of bounds: " + std::to_string(bytes) + " bytes, " + neighbourhood(at));
  if (writes(access) && !region->writable) fail(what() + ": writes to the input '" + region->name + "'");
  return *region;
}

}  // namespace

Region* find(std::deque<Region>& regions, const void* address) {
  const char* at = static_cast<const char*>(address);
  for (Region& region : regions)
    if (at >= region.begin && at < region.begin + region.bytes) return &region;
  return nullptr;
}

// What lies near an address that belongs to nobody.
std::string neighbourhood(const char* at) {
  const Region* nearest = nullptr;
  ptrdiff_t distance = 0;
  const auto look = [&](const Region& region) {
    const ptrdiff_t before = region.begin - at, after = at - (region.begin + region.bytes) + 1;
    const ptrdiff_t away = before > 0 ? before : after;
    if (!nearest || away < distance) nearest = &region, distance = away;
  };
  for (const Region& region : machine.global) look(region);
  for (const Region& region : machine.current->block->shared) look(region);
  if (!nearest || distance > 1 << 20) return "far from every buffer of this launch";
  if (at < nearest->begin) return std::to_string(distance) + " bytes before '" + nearest->name + "'";
  return std::to_string(at - nearest->begin) + " bytes into '" + nearest->name + "', which has " +
         std::to_string(nearest->bytes);
}

Place place_of_counter(const void* program_counter) {
  return kCounterBit | static_cast<Place>(static_cast<const char*>(program_counter) - image().begin - 1);
}

void touch(const char* op, const void* address, size_t bytes, size_t alignment, Access access, Space space,
           Site site) {
  const auto what = [&] { return std::string(op) + " at " + describe(site); };
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail(what() + ": misaligned: expected a multiple of " + std::to_string(alignment) + " bytes, " +
         neighbourhood(static_cast<const char*>(address)));
  Region& region = check_bounds(address, bytes, access, space, what);
  if (tracking && region.writable) track(region, address, bytes, access, place_of(site));
}

void touch_plain(const void* address, size_t bytes, Access access, const void* program_counter) {
  const char* at = static_cast<const char*>(address);
  const Thread& me = *machine.current;
  if (at >= me.stack && at < me.stack + kStackBytes) return;
  const Place place = place_of_counter(program_counter);
  const std::vector<char>& closure = me.block->kernel->closure;
  if ((at >= closure.data() && at < closure.data() + closure.size()) ||
      (at >= image().begin && at < image().end)) {
    if (writes(access)) fail("writes to a constant or a kernel parameter at " + describe_place(place));
    return;
  }
  if (is_stack_address(at)) fail("uses a local variable of another thread at " + describe_place(place));
  Region& region = check_bounds(address, bytes, access, Space::kAny,
                                [&] { return std::string(verb(access)) + " at " + describe_place(place); });
  if (region.writable) track(region, address, bytes, access, place);
}

void load(const char* op, void* to, const void* from, size_t bytes, Site site) {
  note(op, site);
  touch(op, from, bytes, bytes, Access::kRead, Space::kAny, site);
  std::memcpy(to, from, bytes);
}

void store(const char* op, void* to, const void* from, size_t bytes, Site site) {
  note(op, site);
  touch(op, to, bytes, bytes, Access::kWrite, Space::kAny, site);
  std::memcpy(to, from, bytes);
}

}  // namespace simt
