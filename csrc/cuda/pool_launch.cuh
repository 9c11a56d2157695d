// What pool.cu and pool_backward.cu share.
#pragma once

#include "common/problem.h"
#include "cuda/pool.cuh"

namespace resona::cuda {

// All but `chunks`.
template <class T>
PoolParams<T> pool_params(const Shape& s, const Rows& context, const PackedSequences& packed) {
  PoolParams<T> p{};
  p.context = static_cast<const T*>(context.data);
  p.batch_stride = context.batch_stride;
  p.token_stride = context.token_stride;
  p.head_stride = context.head_stride;
  p.batch = s.batch, p.length = s.context;
  p.heads = s.retrieval_heads, p.dim = s.retrieval_dim;
  p.chunk_size = s.chunk_size, p.chunks_per_batch = s.context / s.chunk_size;
  p.packed = packed;
  return p;
}

template <class Params>
struct PoolInstance {
  void (*kernel)(Params);
  int threads;
};

}  // namespace resona::cuda
