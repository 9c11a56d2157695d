#include "cuda/search_attend.cuh"

#include <stdexcept>
#include <type_traits>

#include "cuda/attend_launch.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/search_launch.cuh"
#include "cuda/stages.h"

namespace resona::cuda {
namespace {

static_assert(kMostAttended == kSearchAttendMostSlots, "plans count with this");

template <class T>
struct SearchAttendInstance {
  void (*kernel)(SearchAttendParams<T>);
  int shared_bytes;
};

template <class T>
SearchAttendInstance<T> instance_of(const CudaAttendPlan& plan) {
#define RESONA_MATCH(Element, kLanes)                              \
  if constexpr (std::is_same_v<Element, T>)                        \
    if (plan.dim == 8 * kLanes) {                                  \
      using Config = SearchAttendConfig<T, kLanes>;                \
      return {search_attend_kernel<Config>, Config::kSharedBytes}; \
    }
  RESONA_SEARCH_ATTEND_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error(
      "resona::cuda: search_attend_kernel: the plan names an instance that does not exist");
}

}  // namespace

void search_attend(const FusedProblem& p, const CudaFusedStages& plan, const PackedSequences& packed,
                   Workspace workspace, Stream stream) {
  const SearchArrays arrays = take_search(plan.search, p.retrieve.shape, workspace);
  SearchRows rows = search_rows_of(p.retrieve.shape, packed);
  rows.tiles = plan.search.tiles;
  with_element(p.attend.query.dtype, [&](auto element) {
    using T = decltype(element);
    const SearchAttendInstance<T> instance = instance_of<T>(plan.attend);
    const SearchAttendParams<T> params{search_params<T>(p.retrieve, plan.search, arrays, rows),
                                       attend_params<T>(p.attend, plan.attend, packed)};
    launch({"search_attend_kernel",
            {rows.tiles * plan.search.splits},
            kSearchThreads,
            instance.shared_bytes,
            true,
            plan.search.reason},
           stream, instance.kernel, params);
  });
}

}  // namespace resona::cuda
