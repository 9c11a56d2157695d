// The dense attention kernel on arrays from Python.
#include "cuda/attend_dense.cuh"

#include <stdexcept>

#include "kernels/attend_arguments.h"
#include "runtime/arguments.h"

namespace {

using namespace resona::cuda;

template <class Config, class T>
void launch_dense(const AttendParams<T>& p) {
  const int64_t tiles = (p.queries * p.group() + Config::kRows - 1) / Config::kRows;
  const int64_t blocks = tiles * p.kv_heads * p.batch;
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(blocks));
  const size_t bytes = sizeof(AttendDenseStorage<Config>);
  simt::launch({"attend_dense_kernel", grid, Config::kThreads, bytes, p.packed.cu_seqlens != nullptr},
               [p] { attend_dense_kernel<Config>(p); });
}

template <class T>
void run_of(const simt::Arguments& a) {
  const AttendParams<T> p = simt::attend_params<T>(a);
  const int64_t dim = a.integer("dim_instance");
#define LAUNCH(Element, kDim, kKeys)                                            \
  if constexpr (std::is_same_v<Element, T>) {                                   \
    if (dim == kDim) return launch_dense<AttendDenseConfig<T, kDim, kKeys>>(p); \
  }
  RESONA_ATTEND_DENSE_INSTANCES(LAUNCH)
#undef LAUNCH
  throw std::invalid_argument("attend_dense: no such instance");
}

void run(const simt::Arguments& a) {
  if (a.text("dtype") == "float16") return run_of<Half>(a);
  run_of<BFloat16>(a);
}

const simt::Registration attend_dense("attend_dense", run);

}  // namespace
