#include "cuda/pool.cuh"

#include <stdexcept>
#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/pool_launch.cuh"
#include "cuda/stages.h"

namespace resona::cuda {
namespace {

template <class Config>
auto instance() {
  static_assert(Config::kWarps * Config::kRows == kPoolRowsPerBlock && Config::kPerLane == kElementsPerLane,
                "plans count with these");
  return PoolInstance<PoolParams<typename Config::Element>>{pool_kernel<Config>, Config::kThreads};
}

template <class T>
PoolInstance<PoolParams<T>> instance_of(const CudaPoolPlan& plan) {
#define RESONA_MATCH(Element, kLanes, kVector) \
  if constexpr (std::is_same_v<Element, T>)    \
    if (plan.lanes == kLanes && plan.vector == kVector) return instance<PoolConfig<T, kLanes, kVector>>();
  RESONA_POOL_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error("resona::cuda: pool_kernel: the plan names an instance that does not exist");
}

}  // namespace

void pool_chunks(const PoolProblem& p, const CudaPoolPlan& plan, void* memory, Stream stream) {
  Workspace workspace(memory);
  int32_t* chunk_begin = take_chunk_begin(plan.sequences, workspace);
  pool_chunks(p, plan, find_chunks(p.packed, p.shape, chunk_begin, stream), {nullptr, 0}, stream);
}

void pool_chunks(const PoolProblem& p, const CudaPoolPlan& plan, const PackedSequences& packed,
                 const Counters& counters, Stream stream) {
  with_element(p.context.dtype, [&](auto element) {
    using T = decltype(element);
    PoolParams<T> params = pool_params<T>(p.shape, p.context, packed);
    params.chunks = static_cast<T*>(p.chunks.data);
    params.cleared = counters.at, params.cleared_count = counters.count;
    const auto [kernel, threads] = instance_of<T>(plan);
    launch({"pool_kernel", {plan.blocks}, threads, 0, packed.cu_seqlens != nullptr, plan.reason}, stream,
           kernel, params);
  });
}

}  // namespace resona::cuda
