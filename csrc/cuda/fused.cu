#include "cuda/fused.h"

#include "cuda/packed.cuh"
#include "cuda/stages.h"

namespace resona::cuda {
namespace {

template <class T>
T* behind(T* data, int64_t elements) {
  return data ? data + elements : nullptr;
}

// Batch entries [first, first + batch) as a problem of their own.
FusedProblem part_of(FusedProblem p, int64_t first, int64_t batch) {
  const Shape& s = p.pool.shape;
  const int64_t slots = first * s.queries * s.retrieval_heads * s.top_k;
  p.pool.context.data = p.pool.context.at(first, 0, 0);
  p.retrieve.query.data = p.retrieve.query.at(first, 0, 0);
  p.retrieve.indices += slots;
  p.retrieve.scores = static_cast<float*>(p.retrieve.scores) + slots;
  AttendProblem& a = p.attend;
  a.query.data = a.query.at(first, 0, 0);
  a.key.data = a.key.at(first, 0, 0), a.value.data = a.value.at(first, 0, 0);
  a.indices += slots;
  a.bias = behind(static_cast<const float*>(a.bias), slots);
  a.out.data = a.out.at(first, 0, 0);
  a.lse = static_cast<float*>(a.lse) + first * s.queries * s.heads;
  p.pool.shape.batch = p.retrieve.shape.batch = p.attend.shape.batch = batch;
  return p;
}

}  // namespace

void retrieve_attend(const FusedProblem& problem, const CudaFusedPlan& plan, void* memory, Stream stream) {
  Workspace workspace(memory);
  const FusedArrays arrays = take_fused(plan, workspace);
  const FusedProblem whole = with_chunks(problem, arrays.chunks);
  const Shape& s = whole.pool.shape;
  const PackedSequences packed = find_chunks(whole.pool.packed, s, arrays.chunk_begin, stream);
  for (int64_t first = 0; first < s.batch; first += plan.batch) {
    const bool last = s.batch - first <= plan.batch;
    const CudaFusedStages& stages = last ? plan.last : plan.part;
    FusedProblem p = part_of(whole, first, last ? s.batch - first : plan.batch);
    Workspace scratch = workspace;
    const SearchArrays search = take_search(stages.search, p.pool.shape, scratch);
    pool_chunks(p.pool, stages.pool, packed, {search.tickets, stages.search.tickets()}, stream);
    if (stages.counted) {
      p.retrieve.tile_counts = arrays.tile_counts, p.retrieve.count_pitch = stages.attend.index.count_pitch;
      p.attend.tile_counts = arrays.tile_counts;
    }
    if (stages.attends) {
      search_attend(p, stages, packed, workspace, stream);
      continue;
    }
    retrieve(p.retrieve, stages.search, packed, workspace, stream);
    attend(p.attend, stages.attend, packed, workspace, stream);
  }
}

}  // namespace resona::cuda
