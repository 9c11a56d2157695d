// pool_kernel and chunk_offsets_kernel on arrays from Python.
#include "cuda/pool.cuh"

#include <algorithm>
#include <stdexcept>

#include "runtime/arguments.h"

namespace {

using namespace resona::cuda;

template <class T, int kLanes, bool kVector>
void launch_pool(const PoolParams<T>& p, int64_t blocks) {
  using Config = PoolConfig<T, kLanes, kVector>;
  const simt::LaunchConfig launch{"pool_kernel", dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads),
                                  0, p.packed.cu_seqlens != nullptr};
  simt::launch(launch, [p] { pool_kernel<Config>(p); });
}

template <class T>
void run_pool_of(const simt::Arguments& a) {
  PoolParams<T> p{};
  p.context = a.array<T>("context");
  p.batch_stride = a.integer("batch_stride");
  p.token_stride = a.integer("token_stride");
  p.head_stride = a.integer("head_stride");
  p.chunks = a.array<T>("chunks");
  p.batch = a.integer("batch");
  p.length = a.integer("length");
  p.heads = a.integer("heads");
  p.dim = a.integer("dim");
  p.chunk_size = a.integer("chunk_size");
  p.chunks_per_batch = p.length / p.chunk_size;
  p.packed.cu_seqlens = a.optional_array<int32_t>("cu_seqlens");
  if (p.packed.cu_seqlens) {
    int32_t* chunk_begin = a.array<int32_t>("chunk_begin");
    p.packed.count = a.integer("sequences");
    p.packed.chunk_begin = chunk_begin;
    const ChunkOffsetsParams offsets{p.packed.cu_seqlens, chunk_begin, p.packed.count, p.length,
                                     p.chunk_size};
    simt::launch({"chunk_offsets_kernel", dim3(1), dim3(ChunkOffsetsConfig::kThreads)},
                 [offsets] { chunk_offsets_kernel(offsets); });
  }
  const int64_t blocks = a.integer("blocks"), lanes = a.integer("lanes");
  const bool vector = a.integer("vector") != 0;
#define LAUNCH(Element, kLanes, kVector)                                                         \
  if constexpr (std::is_same_v<Element, T>) {                                                    \
    if (lanes == kLanes && vector == kVector) return launch_pool<T, kLanes, kVector>(p, blocks); \
  }
  RESONA_POOL_INSTANCES(LAUNCH)
#undef LAUNCH
  throw std::invalid_argument("pool: no such instance");
}

void run_pool(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  if (dtype == "float32") return run_pool_of<float>(a);
  if (dtype == "float16") return run_pool_of<Half>(a);
  run_pool_of<BFloat16>(a);
}

const simt::Registration pool("pool", run_pool);

}  // namespace
