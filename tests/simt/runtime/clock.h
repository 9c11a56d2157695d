// Vector clocks: what each thread knows to have happened. They decide whether two accesses race.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace simt {

using Time = uint32_t;

// A moment in the life of a thread, or of an atomic operation of it; 0 is "never".
using Epoch = uint64_t;
constexpr Epoch kAtomicBit = Epoch(1) << 63;

inline Epoch make_epoch(unsigned block, unsigned thread, Time time) {
  return Epoch(block) << 42 | Epoch(thread) << 31 | time;
}
inline unsigned block_of(Epoch epoch) { return static_cast<unsigned>((epoch & ~kAtomicBit) >> 42); }
inline unsigned thread_of(Epoch epoch) { return static_cast<unsigned>(epoch >> 31) & 0x7ffu; }
inline Time time_of(Epoch epoch) { return static_cast<Time>(epoch & 0x7fffffffu); }

// Threads of the own block at hand; other blocks only once an atomic operation has told about them.
struct Clock {
  unsigned block = 0;
  std::vector<Time> own;
  std::map<unsigned, std::vector<Time>> others;  // by block id
  unsigned kernels_done = 0;                     // everything in these many first kernels has happened

  void clear() {
    own.clear();
    others.clear();
  }

  void join(const Clock& other) {
    kernels_done = std::max(kernels_done, other.kernels_done);
    join_block(other.block, other.own);
    for (const auto& [id, times] : other.others) join_block(id, times);
  }

  bool knows(Epoch epoch) const {
    const unsigned id = block_of(epoch);
    if (id == block) return known(own, epoch);
    const auto found = others.find(id);
    return found != others.end() && known(found->second, epoch);
  }

 private:
  static bool known(const std::vector<Time>& times, Epoch epoch) {
    return thread_of(epoch) < times.size() && times[thread_of(epoch)] >= time_of(epoch);
  }

  void join_block(unsigned id, const std::vector<Time>& times) {
    std::vector<Time>& mine = id == block ? own : others[id];
    if (mine.size() < times.size()) mine.resize(times.size());
    for (size_t i = 0; i < times.size(); ++i) mine[i] = std::max(mine[i], times[i]);
  }
};

// What is known about one byte of memory.
struct Cell {
  Epoch write = 0, read = 0;
  std::vector<std::pair<Epoch, uint32_t>>* more_reads = nullptr;
  uint32_t write_place = 0, read_place = 0;  // where in the source, for reports
  bool initialised = false, in_flight = false;
  ~Cell() { delete more_reads; }
  Cell() = default;
  Cell(Cell&& other) noexcept { *this = static_cast<Cell&&>(other); }
  Cell& operator=(Cell&& other) noexcept {
    std::swap(more_reads, other.more_reads);
    write = other.write, read = other.read;
    write_place = other.write_place, read_place = other.read_place;
    initialised = other.initialised, in_flight = other.in_flight;
    return *this;
  }
};

}  // namespace simt
