// cp.async. A copy lands when it is issued or when it is waited for, as the test chooses; between the two
// the race build lets nobody touch its destination, the issuing thread included.
#include <cstring>

#include "state.h"

namespace simt {
namespace {

void land(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

template <class Landed>
void wait(const Landed& landed) {
  std::vector<Copy>& copies = machine.current->copies;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (!landed(copy)) {
      copies[kept++] = copy;
      continue;
    }
    if (!machine.options.copies_land_early) land(copy);
    set_in_flight(copy.shared, copy.bytes, false, copy.site);
  }
  copies.resize(kept);
}

}  // namespace

void copy_async(void* shared, const void* global, size_t bytes, size_t source_bytes, Site site) {
  note("cp.async", site);
  if (source_bytes > bytes) fail("cp.async at " + describe(site) + ": copies more bytes than its size");
  touch("cp.async", shared, bytes, bytes, Access::kWrite, Space::kShared, site);
  if (reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async at " + describe(site) + ": misaligned source: expected a multiple of " +
         std::to_string(bytes) + " bytes");
  if (source_bytes > 0) touch("cp.async", global, source_bytes, 1, Access::kRead, Space::kGlobal, site);
  Thread& me = *machine.current;
  const Copy copy{
      static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes, me.copy_group, site};
  set_in_flight(shared, bytes, true, site);
  if (machine.options.copies_land_early) land(copy);
  me.copies.push_back(copy);
}

void copy_commit(Site site) {
  note("cp.async.commit_group", site);
  ++machine.current->copy_group;
}

void copy_wait(unsigned newer_groups, Site site) {
  note("cp.async.wait_group", site);
  const unsigned committed = machine.current->copy_group;
  wait([&](const Copy& copy) { return copy.group + newer_groups < committed; });
}

void copy_wait_all(Site site) {
  note("cp.async.wait_all", site);
  wait([](const Copy&) { return true; });
}

// Copies that nobody waited for: their destination dies with the block.
void drop_copies(Thread& thread) { thread.copies.clear(); }

}  // namespace simt
