#include "cuda/two_level.h"

#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/search_launch.cuh"
#include "cuda/stages.h"
#include "cuda/two_level.cuh"

namespace resona::cuda {
namespace {

static_assert(RefineConfig::kWarps == kRefineRowsPerBlock, "plans count with these");

constexpr int64_t kMostBlocks = int64_t{1} << 24;

// Chunks are to superchunks what tokens are to chunks: where a sequence's chunks begin is the cu_seqlens of
// those.
struct Packings {
  PackedSequences chunks;       // queries and chunks
  PackedSequences pooling;      // chunks and superchunks
  PackedSequences superchunks;  // queries and superchunks
};

Packings find_packings(const TwoLevelProblem& p, const TwoLevelArrays& arrays, Stream stream) {
  const DeviceSequences& sequences = p.retrieve.packed;
  Packings found;
  found.chunks = find_chunks(sequences, p.retrieve.shape, arrays.chunk_begin, stream);
  const bool is_packed = sequences.cu_seqlens != nullptr;
  const DeviceSequences over_chunks{is_packed ? arrays.chunk_begin : nullptr, sequences.count};
  found.pooling = find_chunks(over_chunks, centroid_shape(p), arrays.superchunk_begin, stream);
  found.superchunks = {sequences.cu_seqlens, arrays.superchunk_begin, sequences.count};
  return found;
}

void refine(const TwoLevelProblem& part, const Shape& whole, const CudaTwoLevelPlan& plan,
            const PackedSequences& packed, const int32_t* probed, Stream stream) {
  const RetrieveProblem& r = part.retrieve;
  const int64_t rows = r.shape.batch * r.shape.queries * r.shape.retrieval_heads;
  const int64_t blocks = (rows + kRefineRowsPerBlock - 1) / kRefineRowsPerBlock;
  with_element(r.query.dtype, [&](auto element) {
    using T = decltype(element);
    RefineParams<T> p{};
    p.rows = search_rows_of(r.shape, packed);
    p.query = search_operand<T>(r.query, r.shape.retrieval_dim);
    p.chunk = search_operand<T>(r.chunks, r.shape.retrieval_dim);
    p.superchunk_size = static_cast<uint32_t>(part.plan.superchunk_size);
    p.probes = static_cast<uint32_t>(part.plan.probes);
    p.probed = probed;
    p.query_slots = whole.retrieval_heads * whole.top_k, p.batch_slots = whole.queries * p.query_slots;
    p.results = search_results(r);
    launch({"refine_kernel",
            {blocks < kMostBlocks ? blocks : kMostBlocks},
            RefineConfig::kThreads,
            0,
            true,
            plan.reason},
           stream, refine_kernel<T>, p);
  });
}

// One part, whose tensors begin where it begins.
void run_part(const TwoLevelProblem& part, const Shape& whole, const CudaTwoLevelPlan& plan,
              const CudaSearchPlan& search, const Packings& packings, const TwoLevelArrays& arrays,
              const Workspace& workspace, Stream stream) {
  const RetrieveProblem& r = part.retrieve;
  const Shape pooled = centroid_shape(part);
  const int64_t dim = pooled.retrieval_dim, row = pooled.retrieval_heads * dim;
  const MutableRows centroids{arrays.centroids, part.superchunks() * row, row, dim, r.chunks.dtype};
  Workspace scratch = workspace;
  const SearchArrays cleared = take_search(search, probe_shape(part), scratch);
  PoolProblem pool{};
  pool.shape = pooled, pool.context = r.chunks, pool.chunks = centroids;
  pool_chunks(pool, plan.pool, packings.pooling, {cleared.tickets, search.tickets()}, stream);
  RetrieveProblem probe = r;
  probe.shape = probe_shape(part);
  probe.chunks = {centroids.data, centroids.batch_stride, centroids.token_stride, centroids.head_stride,
                  centroids.dtype};
  probe.indices = arrays.probed, probe.scores = arrays.scores;
  probe.unit_chunks = true;
  retrieve(probe, search, packings.superchunks, workspace, stream);
  refine(part, whole, plan, packings.chunks, arrays.probed, stream);
}

}  // namespace

void retrieve_two_level(const TwoLevelProblem& p, const CudaTwoLevelPlan& plan, void* memory, Stream stream) {
  if (plan.exact) return retrieve(p.retrieve, plan.probe, memory, stream);
  Workspace workspace(memory);
  const TwoLevelArrays arrays = take_two_level(plan, workspace);
  const Packings packings = find_packings(p, arrays, stream);
  const Shape& s = p.retrieve.shape;
  for (int64_t b = 0; b < s.batch; b += plan.batch)
    for (int64_t r = 0; r < s.retrieval_heads; r += plan.heads)
      for (int64_t q = 0; q < s.queries; q += plan.queries) {
        const bool is_last = s.queries - q <= plan.queries;
        TwoLevelProblem part = part_of(p, plan, q, is_last ? s.queries - q : plan.queries);
        RetrieveProblem& own = part.retrieve;
        own.query.data = own.query.at(b, q, r), own.chunks.data = own.chunks.at(b, 0, r);
        const int64_t slots = ((b * s.queries + q) * s.retrieval_heads + r) * s.top_k;
        own.indices += slots, own.scores = static_cast<float*>(own.scores) + slots;
        run_part(part, s, plan, is_last ? plan.last : plan.probe, packings, arrays, workspace, stream);
      }
}

}  // namespace resona::cuda
