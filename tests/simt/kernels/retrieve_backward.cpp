// The whole of retrieve_backward.cuh, index build included, on arrays from Python.
#include "cuda/retrieve_backward.cuh"

#include "cuda/build_index.cuh"
#include "kernels/stage_arguments.h"

namespace {

using namespace resona::cuda;

template <class T>
void build_lists(const simt::Arguments& a, RetrieveBackwardParams<T>& p) {
  resona::Shape s{};
  s.batch = p.batch, s.queries = p.queries, s.context = p.context, s.retrieval_heads = p.heads;
  s.chunk_size = p.chunk_size, s.top_k = p.top_k;
  const resona::CudaIndexPlan plan = plan_index_cuda(s, stages::kDevice);
  resona::Workspace workspace(stages::workspace_of(a, plan.workspace_bytes));
  const resona::IndexArrays lists =
      build_index({s, p.indices, p.packed, 1, p.segment, 0, 0, false}, plan, workspace, {});
  p.slots = lists.sorted_slots, p.offsets = lists.offsets;
  p.tile_begin = lists.tile_begin, p.tile_totals = lists.tile_totals;
}

template <class T>
RetrieveBackwardParams<T> params_of(const simt::Arguments& a) {
  RetrieveBackwardParams<T> p{};
  p.query = a.array<T>("query");
  p.query_batch_stride = a.integer("query_batch_stride");
  p.query_token_stride = a.integer("query_token_stride");
  p.query_head_stride = a.integer("query_head_stride");
  p.chunks = a.array<T>("chunks");
  p.chunk_batch_stride = a.integer("chunk_batch_stride");
  p.chunk_row_stride = a.integer("chunk_row_stride");
  p.chunk_head_stride = a.integer("chunk_head_stride");
  p.indices = a.array<int32_t>("indices");
  p.score_gradient = a.array<float>("score_gradient");
  p.query_gradient = a.array<T>("query_gradient");
  p.chunk_gradient = a.array<T>("chunk_gradient");
  p.batch = a.integer("batch");
  p.queries = a.integer("queries");
  p.heads = a.integer("heads");
  p.top_k = a.integer("top_k");
  p.context = a.integer("context");
  p.chunk_size = a.integer("chunk_size");
  p.dim = a.integer("dim");
  p.chunks_per_batch = p.context / p.chunk_size;
  p.packed.cu_seqlens = a.optional_array<int32_t>("cu_seqlens");
  p.lanes = static_cast<int>(a.integer("lanes"));
  p.vector = a.integer("vector") != 0;
  p.factors = a.array<float>("factors");
  p.partials = a.array<float>("partials");
  p.segment = a.integer("segment");
  return p;
}

template <class T>
void run_retrieve_backward_of(const simt::Arguments& a) {
  RetrieveBackwardParams<T> p = params_of<T>(a);
  if (p.packed.cu_seqlens) {
    int32_t* chunk_begin = a.array<int32_t>("chunk_begin");
    p.packed.count = a.integer("sequences");
    p.packed.chunk_begin = chunk_begin;
    const ChunkOffsetsParams offsets{p.packed.cu_seqlens, chunk_begin, p.packed.count, p.context,
                                     p.chunk_size};
    simt::launch({"chunk_offsets_kernel", dim3(1), dim3(ChunkOffsetsConfig::kThreads)},
                 [offsets] { chunk_offsets_kernel(offsets); });
  }
  const dim3 blocks(static_cast<unsigned>(a.integer("blocks")));
  constexpr int kThreads = RetrieveBackwardConfig::kThreads;
  simt::launch({"retrieve_query_gradient_kernel", blocks, kThreads, 0, p.packed.cu_seqlens != nullptr},
               [p] { retrieve_query_gradient_kernel(p); });
  build_lists(a, p);
  simt::launch({"retrieve_chunk_segments_kernel", blocks, kThreads, 0, true},
               [p] { retrieve_chunk_segments_kernel(p); });
  simt::launch({"retrieve_chunk_gradient_kernel", blocks, kThreads, 0, true},
               [p] { retrieve_chunk_gradient_kernel(p); });
}

void run_retrieve_backward(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  if (dtype == "float32") return run_retrieve_backward_of<float>(a);
  if (dtype == "float16") return run_retrieve_backward_of<Half>(a);
  run_retrieve_backward_of<BFloat16>(a);
}

const simt::Registration registration("retrieve_backward", run_retrieve_backward);

}  // namespace
