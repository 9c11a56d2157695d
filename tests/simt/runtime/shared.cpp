// Shared memory: one arena per resident block, poisoned when a block starts, with red zones around every
// variable. AddressSanitizer and the race build report an access to them; the plain build looks at the end
// whether they have changed.
#include <cstring>

#include "run.h"

namespace simt {
namespace {

constexpr size_t kSharedLimit = 227 << 10;
constexpr size_t kStaticLimit = 48 << 10;
constexpr size_t kRedZone = 256;
constexpr size_t kArenaBytes = kRedZone + kStaticLimit + kRedZone + kSharedLimit + 1024 + kRedZone;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type
constexpr unsigned char kCanary = 0xa5;

struct alignas(1024) Arena {
  unsigned char bytes[(kArenaBytes + 1023) / 1024 * 1024];
};

// Begins of the parts: canary, static variables, canary, dynamic memory (1024 aligned), canary.
unsigned char* arena(const Block& block) {
  static Arena* const arenas = new Arena[2 * kMaxResident];
  return arenas[block.kernel->number % 2 * kMaxResident + block.slot].bytes;
}
constexpr size_t kDynamicBegin = (kRedZone + kStaticLimit + kRedZone + 1023) / 1024 * 1024;

}  // namespace

void create_shared(Block& block) {
  unsigned char* base = arena(block);
  const size_t dynamic = block.kernel->config.shared_bytes;
  if (dynamic > kSharedLimit)
    throw Error(std::string("launch of '") + block.kernel->config.name + "': " + std::to_string(dynamic) +
                " bytes of shared memory, the limit is " + std::to_string(kSharedLimit));
  unpoison(base, sizeof(Arena));
  std::memset(base, kCanary, kDynamicBegin);
  std::memset(base + kDynamicBegin, kPoison, dynamic);
  std::memset(base + kDynamicBegin + dynamic, kCanary, kRedZone);
  poison(base, kDynamicBegin);
  poison(base + kDynamicBegin + dynamic, sizeof(Arena) - kDynamicBegin - dynamic);
  block.shared_top = reinterpret_cast<char*>(base) + kRedZone;
  Region& region = block.shared.emplace_back();
  region.begin = reinterpret_cast<char*>(base) + kDynamicBegin;
  region.bytes = dynamic;
  region.name = "dynamic shared memory";
  if (tracking) region.cells.resize(dynamic);
}

void* dynamic_shared(Site site) {
  note("dynamic_shared", site);
  return machine.current->block->shared.front().begin;
}

void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name, Site site) {
  note("static_shared", site);
  Block& block = *machine.current->block;
  Region*& found = block.statics[{key, site.line}];
  if (found) return found->begin;
  const uintptr_t top = reinterpret_cast<uintptr_t>(block.shared_top);
  char* begin = block.shared_top + (alignment - top % alignment) % alignment;
  const char* limit = reinterpret_cast<char*>(arena(block)) + kRedZone + kStaticLimit;
  if (begin + bytes > limit)
    fail(std::string("static shared variable '") + name + "': more than 48 KiB in all");
  size_t all = bytes;
  for (const Region& region : block.shared) all += region.bytes;
  if (all > kSharedLimit)
    fail(std::string("static shared variable '") + name + "': " + std::to_string(all) +
         " bytes of static and dynamic shared memory, the limit is " + std::to_string(kSharedLimit));
  found = &block.shared.emplace_back();
  found->begin = begin;
  found->bytes = bytes;
  found->name = name;
  if (tracking) found->cells.resize(bytes);
  unpoison(begin, bytes);
  std::memset(begin, kPoison, bytes);
  block.shared_top = begin + bytes + kRedZone / 4;
  return begin;
}

// The canaries of the plain build; the other builds have reported the access itself.
void destroy_shared(Block& block) {
  unsigned char* base = arena(block);
  unpoison(base, sizeof(Arena));
  const unsigned char* end = base + kDynamicBegin + block.kernel->config.shared_bytes + kRedZone;
  uint64_t canaries;
  std::memset(&canaries, kCanary, sizeof canaries);
  for (const unsigned char* at = base; at < end;) {
    const char* address = reinterpret_cast<const char*>(at);
    if (at + 8 <= end && std::memcmp(at, &canaries, sizeof canaries) == 0) {
      at += 8;
      continue;
    }
    if (*at == kCanary) {
      ++at;
      continue;
    }
    if (const Region* inside = find(block.shared, address)) {
      at = reinterpret_cast<const unsigned char*>(inside->begin + inside->bytes);
      continue;
    }
    machine.current = &block.threads[0];
    const std::string where = neighbourhood(address);
    machine.current = nullptr;
    throw Error(std::string("kernel '") + block.kernel->config.name +
                "': wrote out of bounds of shared memory: " + where);
  }
}

}  // namespace simt
