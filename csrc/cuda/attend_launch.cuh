// From an AttendProblem to what kernels read.
#pragma once

#include "common/plan_attend_cuda.h"
#include "cuda/attend_params.cuh"

namespace resona::cuda {

template <class T>
HeadRows<const T> head_rows(const Rows& r) {
  return {static_cast<const T*>(r.data), r.batch_stride, r.token_stride, r.head_stride};
}

template <class T>
AttendParams<T> attend_params(const AttendProblem& p, const CudaAttendPlan& plan,
                              const PackedSequences& packed) {
  const Shape& s = p.shape;
  AttendParams<T> a{};
  a.query = head_rows<T>(p.query), a.key = head_rows<T>(p.key), a.value = head_rows<T>(p.value);
  a.indices = p.indices;
  a.bias = static_cast<const float*>(p.bias);
  a.bias_scale = static_cast<const float*>(p.bias_scale);
  a.sink = static_cast<const float*>(p.sink);
  a.out = static_cast<T*>(p.out.data);
  a.lse = static_cast<float*>(p.lse);
  a.batch = s.batch, a.queries = s.queries, a.context = s.context;
  a.chunk_size = s.chunk_size, a.chunks = s.context / s.chunk_size, a.top_k = s.top_k;
  a.heads = static_cast<int>(s.heads), a.kv_heads = static_cast<int>(s.kv_heads);
  a.retrieval_heads = static_cast<int>(s.retrieval_heads), a.head_dim = static_cast<int>(s.head_dim);
  a.scale = static_cast<float>(p.scale);
  a.vector = plan.vector;
  a.packed = packed;
  return a;
}

}  // namespace resona::cuda
