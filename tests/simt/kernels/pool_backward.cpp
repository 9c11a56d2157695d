// pool_backward_kernel and chunk_offsets_kernel on arrays from Python.
#include "cuda/pool_backward.cuh"

#include <stdexcept>

#include "runtime/arguments.h"

namespace {

using namespace resona::cuda;

template <class T, int kLanes, bool kVector>
void launch_pool_backward(const PoolBackwardParams<T>& p, int64_t blocks) {
  using Config = PoolBackwardConfig<T, kLanes, kVector>;
  const simt::LaunchConfig launch{"pool_backward_kernel", dim3(static_cast<unsigned>(blocks)),
                                  dim3(Config::kThreads), 0, p.forward.packed.cu_seqlens != nullptr};
  simt::launch(launch, [p] { pool_backward_kernel<Config>(p); });
}

template <class T>
void run_pool_backward_of(const simt::Arguments& a) {
  PoolBackwardParams<T> p{};
  p.chunk_gradient = a.array<T>("chunk_gradient");
  p.context_gradient = a.array<T>("context_gradient");
  PoolParams<T>& f = p.forward;
  f.context = a.array<T>("context");
  f.batch_stride = a.integer("batch_stride");
  f.token_stride = a.integer("token_stride");
  f.head_stride = a.integer("head_stride");
  f.batch = a.integer("batch");
  f.length = a.integer("length");
  f.heads = a.integer("heads");
  f.dim = a.integer("dim");
  f.chunk_size = a.integer("chunk_size");
  f.chunks_per_batch = f.length / f.chunk_size;
  f.packed.cu_seqlens = a.optional_array<int32_t>("cu_seqlens");
  if (f.packed.cu_seqlens) {
    int32_t* chunk_begin = a.array<int32_t>("chunk_begin");
    f.packed.count = a.integer("sequences");
    f.packed.chunk_begin = chunk_begin;
    const ChunkOffsetsParams offsets{f.packed.cu_seqlens, chunk_begin, f.packed.count, f.length,
                                     f.chunk_size};
    simt::launch({"chunk_offsets_kernel", dim3(1), dim3(ChunkOffsetsConfig::kThreads)},
                 [offsets] { chunk_offsets_kernel(offsets); });
  }
  const int64_t blocks = a.integer("blocks"), lanes = a.integer("lanes");
  const bool vector = a.integer("vector") != 0;
#define LAUNCH(Element, kLanes, kVector)                                                                  \
  if constexpr (std::is_same_v<Element, T>) {                                                             \
    if (lanes == kLanes && vector == kVector) return launch_pool_backward<T, kLanes, kVector>(p, blocks); \
  }
  RESONA_POOL_BACKWARD_INSTANCES(LAUNCH)
#undef LAUNCH
  throw std::invalid_argument("pool_backward: no such instance");
}

void run_pool_backward(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  if (dtype == "float32") return run_pool_backward_of<float>(a);
  if (dtype == "float16") return run_pool_backward_of<Half>(a);
  run_pool_backward_of<BFloat16>(a);
}

const simt::Registration registration("pool_backward", run_pool_backward);

}  // namespace
