// Warp collectives: each lane deposits its argument, and the last to arrive computes for all of them.
// None of them orders memory; only __syncwarp does.
#include <cstring>

#include "state.h"

namespace simt {
namespace {

struct Lanes {
  void** arguments;
  unsigned arrived;
  template <class A>
  A& at(unsigned lane) const {
    return *static_cast<A*>(arguments[lane]);
  }
};

unsigned mask_of_existing(const Warp& warp) {
  unsigned mask = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) mask |= unsigned(warp.lanes[lane] != nullptr) << lane;
  return mask;
}

Collective& join(const char* op, unsigned mask, void* argument, bool aligned, Site site) {
  Warp& warp = *machine.current->warp;
  const unsigned bit = 1u << machine.current->lane;
  for (Collective& c : warp.pending) {
    if (c.mask != mask || c.arrived & bit) continue;
    if (std::strcmp(c.op, op) != 0 || (aligned && c.site.line != site.line))
      fail("divergent " + std::string(op) + " at " + describe(site) + ": other lanes of its mask are at " +
           c.op + " at " + describe(c.site));
    c.arrived |= bit;
    c.arguments[machine.current->lane] = argument;
    return c;
  }
  warp.pending.push_back({op, mask, bit, {}, site});
  warp.pending.back().arguments[machine.current->lane] = argument;
  return warp.pending.back();
}

// `apply(lanes)` runs once, by the last lane to arrive. `aligned`: all lanes must be at one instruction.
template <class F>
void collective(const char* op, unsigned mask, void* argument, bool aligned, Site site, const F& apply) {
  note(op, site, mask);
  Thread& me = *machine.current;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1)) fail(std::string(op) + " at " + describe(site) + ": not in its own mask");
  const Collective& c = join(op, mask & mask_of_existing(warp), argument, aligned, site);
  if (c.mask & ~c.arrived) {
    if (c.mask & ~warp.live)
      fail(std::string(op) + " at " + describe(site) + ": a lane of its mask has exited");
    block_current();
    return;
  }
  Collective done = c;
  warp.pending.erase(warp.pending.begin() + (&c - warp.pending.data()));
  apply(Lanes{done.arguments, done.arrived});
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (done.arrived >> lane & 1) wake(*warp.lanes[lane]);
  yield();
}

void require_whole_warp(const char* op, Site site) {
  if (machine.current->warp->live != ~0u)
    fail(std::string(op) + " at " + describe(site) + ": needs all 32 lanes of the warp");
}

template <class F>
void for_lanes(unsigned mask, const F& f) {
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) f(lane);
}

}  // namespace

void sync_warp(unsigned mask, Site site) {
  Warp& warp = *machine.current->warp;
  collective("__syncwarp", mask, nullptr, false, site, [&](const Lanes& lanes) {
    if (!tracking) return;
    Clock gathered;
    gathered.block = warp.block->id;
    for_lanes(lanes.arrived, [&](unsigned lane) { gathered.join(warp.lanes[lane]->clock); });
    for_lanes(lanes.arrived, [&](unsigned lane) {
      Thread& thread = *warp.lanes[lane];
      thread.clock.join(gathered);
      ++thread.clock.own[thread.number];
    });
  });
}

void shuffle(Shuffle kind, unsigned mask, void* value, size_t bytes, int lane, int width, Site site) {
  struct Argument {
    void* value;
    int lane, width;
    char out[16];
  } mine{value, lane, width, {}};
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* op = names[static_cast<int>(kind)];
  if (bytes > sizeof mine.out) fail(std::string(op) + ": value of more than 16 bytes");
  if (width < 1 || width > 32 || width & (width - 1)) fail(std::string(op) + ": width is not a power of two");
  collective(op, mask, &mine, true, site, [&](const Lanes& lanes) {
    for_lanes(lanes.arrived, [&](unsigned at) {
      Argument& a = lanes.at<Argument>(at);
      const int me = static_cast<int>(at), first = me & ~(a.width - 1), end = first + a.width;
      int from = me;
      if (kind == Shuffle::kIndex) from = first + (a.lane & (a.width - 1));
      if (kind == Shuffle::kUp && me - a.lane >= first) from = me - a.lane;
      if (kind == Shuffle::kDown && me + a.lane < end) from = me + a.lane;
      if (kind == Shuffle::kXor && (me ^ a.lane) < end) from = me ^ a.lane;
      if (!(lanes.arrived >> from & 1))
        fail(std::string(op) + " at " + describe(site) + ": lane " + std::to_string(at) + " reads lane " +
             std::to_string(from) + ", which takes no part");
      std::memcpy(a.out, lanes.at<Argument>(static_cast<unsigned>(from)).value, bytes);
    });
    for_lanes(lanes.arrived, [&](unsigned at) {
      Argument& a = lanes.at<Argument>(at);
      std::memcpy(a.value, a.out, bytes);
    });
  });
}

Vote vote(const char* op, unsigned mask, bool predicate, Site site) {
  struct Argument {
    bool predicate;
    Vote out;
  } mine{predicate, {}};
  collective(op, mask, &mine, true, site, [](const Lanes& lanes) {
    Vote result{0, lanes.arrived};
    for_lanes(lanes.arrived,
              [&](unsigned lane) { result.ballot |= unsigned(lanes.at<Argument>(lane).predicate) << lane; });
    for_lanes(lanes.arrived, [&](unsigned lane) { lanes.at<Argument>(lane).out = result; });
  });
  return mine.out;
}

unsigned match_any(unsigned mask, uint64_t value, Site site) {
  struct Argument {
    uint64_t value;
    unsigned out;
  } mine{value, 0};
  collective("__match_any_sync", mask, &mine, true, site, [](const Lanes& lanes) {
    for_lanes(lanes.arrived, [&](unsigned a) {
      for_lanes(lanes.arrived, [&](unsigned b) {
        const bool same = lanes.at<Argument>(a).value == lanes.at<Argument>(b).value;
        lanes.at<Argument>(a).out |= unsigned(same) << b;
      });
    });
  });
  return mine.out;
}

// The hardware promises no more than that the caller is among them.
unsigned active_mask() { return 1u << machine.current->lane; }

uint32_t reduce(Reduce kind, bool is_signed, unsigned mask, uint32_t value, Site site) {
  static const char* const names[] = {"__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                      "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  const auto combine = [&](uint32_t a, uint32_t b) {
    const bool less = is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
    switch (kind) {
      case Reduce::kAdd:
        return a + b;
      case Reduce::kMin:
        return less ? a : b;
      case Reduce::kMax:
        return less ? b : a;
      case Reduce::kAnd:
        return a & b;
      case Reduce::kOr:
        return a | b;
      default:
        return a ^ b;
    }
  };
  uint32_t mine = value;
  collective(names[static_cast<int>(kind)], mask, &mine, true, site, [&](const Lanes& lanes) {
    const unsigned first = static_cast<unsigned>(__builtin_ctz(lanes.arrived));
    uint32_t result = lanes.at<uint32_t>(first);
    for_lanes(lanes.arrived & ~(1u << first),
              [&](unsigned lane) { result = combine(result, lanes.at<uint32_t>(lane)); });
    for_lanes(lanes.arrived, [&](unsigned lane) { lanes.at<uint32_t>(lane) = result; });
  });
  return mine;
}

namespace {

struct MatrixArgument {
  uint32_t* registers;
  char* row;
};

// Row r of matrix m comes from lane 8 m + r; element (r, c) sits in lane 4 r + c / 2, half c % 2, and
// with `transposed` element (c, r) does.
template <class F>
void for_elements(int matrices, bool transposed, const Lanes& lanes, const F& f) {
  for (int m = 0; m < matrices; ++m)
    for (unsigned row = 0; row < 8; ++row)
      for (unsigned column = 0; column < 8; ++column) {
        const unsigned r = transposed ? column : row, c = transposed ? row : column;
        char* in_memory = lanes.at<MatrixArgument>(8 * m + row).row + 2 * column;
        uint32_t* in_register = lanes.at<MatrixArgument>(4 * r + c / 2).registers + m;
        f(in_memory, reinterpret_cast<char*>(in_register) + 2 * (c % 2));
      }
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Site site) {
  note("ldmatrix", site);
  require_whole_warp("ldmatrix", site);
  if (machine.current->lane < 8u * matrices)
    touch("ldmatrix", row, 16, 16, Access::kRead, Space::kShared, site);
  MatrixArgument mine{registers, static_cast<char*>(const_cast<void*>(row))};
  collective("ldmatrix", ~0u, &mine, true, site, [&](const Lanes& lanes) {
    for_elements(matrices, transposed, lanes, [](char* memory, char* reg) { std::memcpy(reg, memory, 2); });
  });
}

void stmatrix(const uint32_t* registers, int matrices, bool transposed, void* row, Site site) {
  note("stmatrix", site);
  require_whole_warp("stmatrix", site);
  if (machine.current->lane < 8u * matrices)
    touch("stmatrix", row, 16, 16, Access::kWrite, Space::kShared, site);
  MatrixArgument mine{const_cast<uint32_t*>(registers), static_cast<char*>(row)};
  collective("stmatrix", ~0u, &mine, true, site, [&](const Lanes& lanes) {
    for_elements(matrices, transposed, lanes, [](char* memory, char* reg) { std::memcpy(memory, reg, 2); });
  });
}

// multiply.cpp
void multiply(Multiply kind, float* const* c, const uint32_t* const* a, const uint32_t* const* b);

void mma(Multiply kind, float* c, const uint32_t* a, const uint32_t* b, Site site) {
  struct Argument {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  static const char* const names[] = {"mma.m16n8k16.bf16", "mma.m16n8k16.f16", "mma.m16n8k8.tf32"};
  const char* op = names[static_cast<int>(kind)];
  require_whole_warp(op, site);
  collective(op, ~0u, &mine, true, site, [&](const Lanes& lanes) {
    float* all_c[kWarpSize];
    const uint32_t *all_a[kWarpSize], *all_b[kWarpSize];
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const Argument& argument = lanes.at<Argument>(lane);
      all_c[lane] = argument.c, all_a[lane] = argument.a, all_b[lane] = argument.b;
    }
    multiply(kind, all_c, all_a, all_b);
  });
}

}  // namespace simt
