// Races, uninitialised reads and copies in flight, byte by byte; race build only.
#pragma once

#include <string>

#include "state.h"

namespace simt {

// A place in the source: a number from place_of(site), or an offset in this library with the top bit set.
using Place = uint32_t;
constexpr Place kCounterBit = 0x80000000u;
Place place_of(Site site);
Place place_of_counter(const void* program_counter);
std::string describe_place(Place place);

const char* verb(Access access);
inline bool writes(Access access) { return access == Access::kWrite || access == Access::kAtomicWrite; }

// Remembers an access of the current thread to bytes of a writable region; fails if it must not be.
void track(Region& region, const void* address, size_t bytes, Access access, Place place);

}  // namespace simt
