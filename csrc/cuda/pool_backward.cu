#include "cuda/pool_backward.cuh"

#include <stdexcept>
#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/pool_launch.cuh"

namespace resona::cuda {
namespace {

template <class Config>
auto instance() {
  static_assert(Config::kWarps * Config::kRows == kPoolRowsPerBlock && Config::kPerLane == kElementsPerLane,
                "plans count with these");
  using Params = PoolBackwardParams<typename Config::Element>;
  return PoolInstance<Params>{pool_backward_kernel<Config>, Config::kThreads};
}

template <class T>
PoolInstance<PoolBackwardParams<T>> instance_of(const CudaPoolPlan& plan) {
#define RESONA_MATCH(Element, kLanes, kVector)          \
  if constexpr (std::is_same_v<Element, T>)             \
    if (plan.lanes == kLanes && plan.vector == kVector) \
      return instance<PoolBackwardConfig<T, kLanes, kVector>>();
  RESONA_POOL_BACKWARD_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error(
      "resona::cuda: pool_backward_kernel: the plan names an instance that does not exist");
}

}  // namespace

void pool_chunks_backward(const PoolBackwardProblem& p, const CudaPoolPlan& plan, void* memory,
                          Stream stream) {
  Workspace workspace(memory);
  int32_t* chunk_begin = take_chunk_begin(plan.sequences, workspace);
  const PackedSequences packed = find_chunks(p.packed, p.shape, chunk_begin, stream);
  with_element(p.context.dtype, [&](auto element) {
    using T = decltype(element);
    PoolBackwardParams<T> params{};
    params.forward = pool_params<T>(p.shape, p.context, packed);
    params.chunk_gradient = static_cast<const T*>(p.chunk_gradient.data);
    params.context_gradient = static_cast<T*>(p.context_gradient.data);
    const auto [kernel, threads] = instance_of<T>(plan);
    launch({"pool_backward_kernel", {plan.blocks}, threads, 0, packed.cu_seqlens != nullptr, plan.reason},
           stream, kernel, params);
  });
}

}  // namespace resona::cuda
