// The query-stationary attention kernels on arrays from Python.
#include "cuda/attend_query.cuh"

#include <stdexcept>

#include "cuda/attend_query_mma.cuh"
#include "kernels/attend_arguments.h"
#include "runtime/arguments.h"

namespace {

using namespace resona::cuda;

struct Choice {
  int64_t lanes, heads, dim;  // dim 0: lanes and heads of attend_query_kernel, else attend_query_mma_kernel
  int splits;
  unsigned blocks;
};

template <class Config, class T>
void launch_lanes(const AttendParams<T>& p, const Choice& choice) {
  const int splits = choice.splits;
  const size_t bytes = splits > 1 ? Config::kSplitBytes : 0;
  const bool dependent = p.packed.cu_seqlens != nullptr;
  simt::launch({"attend_query_kernel", choice.blocks, Config::kThreads, bytes, dependent},
               [p, splits] { attend_query_kernel<Config>(p, splits); });
}

template <class Config, class T>
void launch_mma(const AttendParams<T>& p, const Choice& choice) {
  const int splits = choice.splits;
  const size_t bytes = splits > 1 ? Config::kSplitBytes : 0;
  const bool dependent = p.packed.cu_seqlens != nullptr;
  simt::launch({"attend_query_mma_kernel", choice.blocks, Config::kThreads, bytes, dependent},
               [p, splits] { attend_query_mma_kernel<Config>(p, splits); });
}

template <class T>
void run_of(const simt::Arguments& a) {
  const AttendParams<T> p = simt::attend_params<T>(a);
  const Choice choice{a.integer("lanes"), a.integer("heads_at_once"), a.integer("dim_instance"),
                      static_cast<int>(a.integer("splits")), static_cast<unsigned>(a.integer("blocks"))};
#define LANES(Element, kLanes, kHeads, kVector)                                                 \
  if constexpr (std::is_same_v<Element, T>) {                                                   \
    if (!choice.dim && choice.lanes == kLanes && choice.heads == kHeads && p.vector == kVector) \
      return launch_lanes<AttendQueryConfig<T, kLanes, kHeads, kVector>>(p, choice);            \
  }
#define MMA(Element, kDim, kHeadTiles)                                         \
  if constexpr (std::is_same_v<Element, T>) {                                  \
    if (choice.dim == kDim && choice.heads == 8 * kHeadTiles)                  \
      return launch_mma<AttendQueryMmaConfig<T, kDim, kHeadTiles>>(p, choice); \
  }
  RESONA_ATTEND_QUERY_INSTANCES(LANES)
  RESONA_ATTEND_QUERY_MMA_INSTANCES(MMA)
#undef LANES
#undef MMA
  throw std::invalid_argument("attend_query: no such instance");
}

void run(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  if (dtype == "float32") return run_of<float>(a);
  if (dtype == "float16") return run_of<Half>(a);
  run_of<BFloat16>(a);
}

const simt::Registration attend_query("attend_query", run);

}  // namespace
