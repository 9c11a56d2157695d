// Small kernels, each with a mistake that `bug` turns on. The simulator must find it, and must be content
// with the same kernel without it. Every kernel reads `in` and writes `out`, so that tests can compare.
#include <stdexcept>

#include "cuda/device.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/memory.cuh"
#include "runtime/arguments.h"

namespace {

using namespace resona::cuda;

constexpr int kThreads = 64;

struct Params {
  const uint32_t* in;
  uint32_t* out;
  uint32_t* work;
  bool bug;
};

struct Tile {
  alignas(16) uint32_t at[kThreads];
};

// out[t] = in[63 - t]
__global__ void missing_barrier(Params p) {
  RESONA_SHARED(Tile, tile);
  tile.at[threadIdx.x] = p.in[threadIdx.x];
  if (!p.bug) __syncthreads();
  p.out[threadIdx.x] = tile.at[kThreads - 1 - threadIdx.x];
}

// out[t] = in[t ^ 1]; a shuffle brings the lanes together, but it does not order their memory.
__global__ void missing_warp_barrier(Params p) {
  RESONA_SHARED(Tile, tile);
  tile.at[threadIdx.x] = p.in[threadIdx.x];
  if (p.bug)
    __shfl_sync(kAllLanes, 0, 0);
  else
    __syncwarp();
  p.out[threadIdx.x] = tile.at[threadIdx.x ^ 1];
}

// out[t] = in[t]
__global__ void missing_wait(Params p) {
  RESONA_SHARED(Tile, tile);
  if (threadIdx.x < kThreads / 4) ptx::cp_async_cg_16(tile.at + 4 * threadIdx.x, p.in + 4 * threadIdx.x);
  ptx::cp_async_commit_group();
  if (!p.bug) ptx::cp_async_wait_group<0>();
  __syncthreads();
  p.out[threadIdx.x] = tile.at[threadIdx.x];
}

// out[64 tile + t] = in[64 tile + 63 - t]; the next tile must not replace what is still being read.
__global__ void missing_trailing_barrier(Params p) {
  RESONA_SHARED(Tile, tile);
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x < kThreads / 4)
      ptx::cp_async_cg_16(tile.at + 4 * threadIdx.x, p.in + i * kThreads + 4 * threadIdx.x);
    ptx::cp_async_wait_all();
    __syncthreads();
    p.out[i * kThreads + threadIdx.x] = tile.at[kThreads - 1 - threadIdx.x];
    if (!p.bug) __syncthreads();
  }
}

// out[t] = in[t]; 64 elements, in rows of four.
__global__ void row_out_of_bounds(Params p) {
  const int row = threadIdx.x / 4 + (p.bug ? 1 : 0);
  p.out[threadIdx.x] = p.in[4 * row + threadIdx.x % 4];
}

__global__ void vector_out_of_bounds(Params p) {
  if (threadIdx.x >= kThreads / 4) return;
  const uint4 x = ptx::ld_global_no_allocate_v4(p.in + 4 * (threadIdx.x + (p.bug ? 1 : 0)));
  ptx::st_global_v4(p.out + 4 * threadIdx.x, x);
}

__global__ void shared_out_of_bounds(Params p) {
  RESONA_SHARED(Tile, tile);
  uint32_t* at = tile.at;
  at[threadIdx.x + (p.bug ? 1 : 0)] = p.in[threadIdx.x];
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

__global__ void local_out_of_bounds(Params p) {
  uint32_t mine[4] = {0, 1, 2, 3};
  const int at = static_cast<int>(p.in[threadIdx.x] % 4);
  mine[at + (p.bug ? 4 : 0)] = p.in[threadIdx.x];
  p.out[threadIdx.x] = mine[p.in[threadIdx.x] % 4];
}

// out[t] = in[t ^ 1]
__global__ void divergent_shuffle(Params p) {
  const uint32_t mine = p.in[threadIdx.x];
  uint32_t other;
  if (p.bug && threadIdx.x % 32 < 16) {
    other = __shfl_xor_sync(kAllLanes, mine, 1);
  } else {
    other = __shfl_xor_sync(kAllLanes, mine, 1);
  }
  p.out[threadIdx.x] = other;
}

// out[t] = in[t ^ 1]; with the bug, lanes leave that the mask names.
__global__ void shuffle_after_exit(Params p) {
  p.out[threadIdx.x] = p.in[threadIdx.x ^ 1];
  if (p.bug && threadIdx.x % 32 == 7) return;
  p.out[threadIdx.x] = __shfl_xor_sync(kAllLanes, p.in[threadIdx.x], 1);
}

struct Total {
  uint32_t ticket;
};

// work[b] = in[b]; the block that arrives last adds all up into out[0]. `order`: who forgets what.
template <int kForgets>
__global__ void last_arriver(Params p) {
  RESONA_SHARED(Total, total);
  uint32_t* counter = p.work + gridDim.x;
  if (threadIdx.x == 0) {
    p.work[blockIdx.x] = p.in[blockIdx.x];
    if (!(p.bug && kForgets == 0)) __threadfence();
    total.ticket = ptx::atom_add_relaxed_gpu(counter, 1);
    if (!(p.bug && kForgets == 1)) __threadfence();
  }
  __syncthreads();
  if (total.ticket != gridDim.x - 1 || threadIdx.x != kThreads - 1) return;
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += p.work[b];
  p.out[0] = sum;
}

// The same with the order on the atomic itself.
__global__ void last_arriver_acq_rel(Params p) {
  uint32_t* counter = p.work + gridDim.x;
  if (threadIdx.x != 0) return;
  p.work[blockIdx.x] = p.in[blockIdx.x];
  const uint32_t ticket =
      p.bug ? ptx::atom_add_relaxed_gpu(counter, 1) : ptx::atom_add_acq_rel_gpu(counter, 1);
  if (ticket != gridDim.x - 1) return;
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += p.work[b];
  p.out[0] = sum;
}

// out[t] = in[t]
__global__ void uninitialised_shared(Params p) {
  RESONA_SHARED(Tile, tile);
  if (!p.bug || threadIdx.x != 5) tile.at[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = tile.at[threadIdx.x];
}

// out[0] = number of threads; `work` comes from an allocator that does not clear it.
__global__ void uninitialised_counter(Params p) {
  if (threadIdx.x == 0 && !p.bug) p.work[0] = 0;
  __syncthreads();
  const uint32_t before = ptx::atom_add_relaxed_cta(p.work, 1);
  if (before == kThreads - 1) p.out[0] = before + 1;
}

__global__ void misaligned_load(Params p) {
  if (threadIdx.x > 0) return;
  ptx::st_global_v4(p.out, ptx::ld_global_no_allocate_v4(p.in + (p.bug ? 1 : 0)));
}

__global__ void misaligned_pointer(Params p) {
  if (threadIdx.x > 0) return;
  const int2 x = *reinterpret_cast<const int2*>(p.in + (p.bug ? 1 : 0));
  p.out[0] = static_cast<uint32_t>(x.x), p.out[1] = static_cast<uint32_t>(x.y);
}

// out[t] = in[t]; with the bug half of the threads of barrier 1 never come.
__global__ void deadlock(Params p) {
  if (threadIdx.x < 32)
    ptx::barrier_sync(1, 64);
  else if (!p.bug)
    ptx::barrier_arrive(1, 64);
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

__global__ void barrier_in_branch(Params p) {
  if (p.bug && threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

// Block 1 passes a value to block 0, or blocks wait for one that may never run beside them.
__global__ void spin_on_block(Params p) {
  if (threadIdx.x > 0) return;
  if (blockIdx.x == 1) {
    p.work[1] = p.in[0];
    ptx::st_release_gpu(p.work, 1);
  } else if (p.bug && blockIdx.x == 0) {
    while (ptx::ld_acquire_gpu(p.work) == 0) __nanosleep(20);
    p.out[0] = p.work[1];
  }
}

// Two blocks write one element.
__global__ void blocks_collide(Params p) {
  if (threadIdx.x == 0) p.out[p.bug ? 0 : blockIdx.x] = p.in[0];
}

__global__ void writes_input(Params p) {
  p.out[threadIdx.x] = p.in[threadIdx.x];
  if (p.bug) const_cast<uint32_t*>(p.in)[threadIdx.x] = 0;
}

__device__ int descend(const Params& p, int depth) {
  volatile int here[256];
  here[depth % 256] = depth;
  return depth == 0 ? 0 : descend(p, depth - 1) + here[depth % 256];
}

__global__ void stack_overflow(Params p) {
  p.out[threadIdx.x] = p.in[threadIdx.x] + static_cast<uint32_t>(0 * descend(p, p.bug ? 100000 : 3));
}

// work[t] = in[t] by the primary; out[t] = work[t] by its dependent.
__global__ void primary(Params p) {
  ptx::griddepcontrol_launch_dependents();
  p.work[blockIdx.x * kThreads + threadIdx.x] = p.in[blockIdx.x * kThreads + threadIdx.x];
}

__global__ void dependent(Params p) {
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (!p.bug) ptx::griddepcontrol_wait();
  p.out[at] = p.work[at];
  if (p.bug) ptx::griddepcontrol_wait();
}

template <void kKernel(Params)>
void run(const simt::Arguments& a) {
  const Params p{a.array<uint32_t>("in"), a.array<uint32_t>("out"), a.optional_array<uint32_t>("work"),
                 a.integer("bug") != 0};
  const dim3 blocks(static_cast<unsigned>(a.integer("blocks")));
  simt::launch({"planted", blocks, dim3(kThreads)}, [p] { kKernel(p); });
}

// out[t] = in[t], with all the dynamic memory that there is; with the bug and a static variable beside it.
__global__ void much_shared(Params p) {
  if (p.bug) {
    RESONA_SHARED(Tile, tile);
    tile.at[threadIdx.x] = p.in[threadIdx.x];
  }
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

void run_much_shared(const simt::Arguments& a) {
  const Params p{a.array<uint32_t>("in"), a.array<uint32_t>("out"), nullptr, a.integer("bug") != 0};
  simt::launch({"planted", dim3(1), dim3(kThreads), 227 << 10}, [p] { much_shared(p); });
}

void run_dependent(const simt::Arguments& a) {
  const Params p{a.array<uint32_t>("in"), a.array<uint32_t>("out"), a.array<uint32_t>("work"),
                 a.integer("bug") != 0};
  const dim3 blocks(static_cast<unsigned>(a.integer("blocks")));
  simt::launch({"primary", blocks, dim3(kThreads)}, [p] { primary(p); });
  simt::launch({"dependent", blocks, dim3(kThreads), 0, true}, [p] { dependent(p); });
}

const simt::Registration registrations[] = {
    {"missing_barrier", run<missing_barrier>},
    {"missing_warp_barrier", run<missing_warp_barrier>},
    {"missing_wait", run<missing_wait>},
    {"missing_trailing_barrier", run<missing_trailing_barrier>},
    {"row_out_of_bounds", run<row_out_of_bounds>},
    {"vector_out_of_bounds", run<vector_out_of_bounds>},
    {"shared_out_of_bounds", run<shared_out_of_bounds>},
    {"local_out_of_bounds", run<local_out_of_bounds>},
    {"divergent_shuffle", run<divergent_shuffle>},
    {"shuffle_after_exit", run<shuffle_after_exit>},
    {"missing_release_fence", run<last_arriver<0>>},
    {"missing_acquire_fence", run<last_arriver<1>>},
    {"relaxed_ticket", run<last_arriver_acq_rel>},
    {"uninitialised_shared", run<uninitialised_shared>},
    {"uninitialised_counter", run<uninitialised_counter>},
    {"misaligned_load", run<misaligned_load>},
    {"misaligned_pointer", run<misaligned_pointer>},
    {"deadlock", run<deadlock>},
    {"barrier_in_branch", run<barrier_in_branch>},
    {"spin_on_block", run<spin_on_block>},
    {"blocks_collide", run<blocks_collide>},
    {"writes_input", run<writes_input>},
    {"stack_overflow", run<stack_overflow>},
    {"dependent_reads_early", run_dependent},
    {"too_much_shared", run_much_shared},
};

}  // namespace
