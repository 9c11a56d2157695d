#include "cuda/attend_query.cuh"

#include <stdexcept>
#include <type_traits>

#include "cuda/attend_launch.cuh"
#include "cuda/attend_query_mma.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/stages.h"

namespace resona::cuda {
namespace {

template <class T>
struct QueryInstance {
  const char* name;
  void (*kernel)(AttendParams<T>, int);
  int threads, split_bytes;
};

template <class T>
QueryInstance<T> lanes_instance(const CudaAttendPlan& plan) {
#define RESONA_MATCH(Element, kLanes, kHeads, kVector)                                                    \
  if constexpr (std::is_same_v<Element, T>)                                                               \
    if (plan.dim == 8 * kLanes && plan.heads == kHeads && plan.vector == kVector) {                       \
      using Config = AttendQueryConfig<T, kLanes, kHeads, kVector>;                                       \
      return {"attend_query_kernel", attend_query_kernel<Config>, Config::kThreads, Config::kSplitBytes}; \
    }
  RESONA_ATTEND_QUERY_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error("resona::cuda: attend_query_kernel: the plan names an instance that does not exist");
}

template <class T>
QueryInstance<T> mma_instance(const CudaAttendPlan& plan) {
#define RESONA_MATCH(Element, kDim, kHeadTiles)                                             \
  if constexpr (std::is_same_v<Element, T>)                                                 \
    if (plan.dim == kDim && plan.heads == 8 * kHeadTiles) {                                 \
      using Config = AttendQueryMmaConfig<T, kDim, kHeadTiles>;                             \
      return {"attend_query_mma_kernel", attend_query_mma_kernel<Config>, Config::kThreads, \
              Config::kSplitBytes};                                                         \
    }
  RESONA_ATTEND_QUERY_MMA_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error(
      "resona::cuda: attend_query_mma_kernel: the plan names an instance that does not exist");
}

}  // namespace

void attend_query(const AttendProblem& p, const CudaAttendPlan& plan, const PackedSequences& packed,
                  Stream stream) {
  with_element(p.query.dtype, [&](auto element) {
    using T = decltype(element);
    const QueryInstance<T> i =
        plan.path == AttendPath::kQuery ? lanes_instance<T>(plan) : mma_instance<T>(plan);
    const int splits = static_cast<int>(plan.splits);
    launch({i.name, {plan.blocks}, i.threads, splits > 1 ? i.split_bytes : 0, true, plan.reason}, stream,
           i.kernel, attend_params<T>(p, plan, packed), splits);
  });
}

}  // namespace resona::cuda
