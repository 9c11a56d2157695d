#include "cuda/attend_dense.cuh"

#include <stdexcept>
#include <type_traits>

#include "cuda/attend_launch.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/stages.h"

namespace resona::cuda {
namespace {

template <class T>
struct DenseInstance {
  void (*kernel)(AttendParams<T>);
  int threads, shared_bytes;
};

template <class T>
DenseInstance<T> instance_of(const CudaAttendPlan& plan) {
#define RESONA_MATCH(Element, kDim, kKeys)                                                             \
  if constexpr (std::is_same_v<Element, T>)                                                            \
    if (plan.dim == kDim) {                                                                            \
      using Config = AttendDenseConfig<T, kDim, kKeys>;                                                \
      return {attend_dense_kernel<Config>, Config::kThreads, int{sizeof(AttendDenseStorage<Config>)}}; \
    }
  RESONA_ATTEND_DENSE_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error("resona::cuda: attend_dense_kernel: the plan names an instance that does not exist");
}

}  // namespace

void attend_dense(const AttendProblem& p, const CudaAttendPlan& plan, const PackedSequences& packed,
                  Stream stream) {
  with_element(p.query.dtype, [&](auto element) {
    using T = decltype(element);
    const DenseInstance<T> i = instance_of<T>(plan);
    launch({"attend_dense_kernel", {plan.blocks}, i.threads, i.shared_bytes, true, plan.reason}, stream,
           i.kernel, attend_params<T>(p, plan, packed));
  });
}

}  // namespace resona::cuda
