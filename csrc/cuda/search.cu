#include "cuda/search.cuh"

#include <stdexcept>
#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/search_exact.cuh"
#include "cuda/search_launch.cuh"
#include "cuda/stages.h"

namespace resona::cuda {
namespace {

static_assert(kSearchRows == kSearchTileRows && kSearchChunks == kSearchStepChunks &&
                  kMostCandidates == kSearchMostCandidates && kMostKept == kSearchMostSlots &&
                  kSearchRows == kIndexTileQueries && kMostCounted >= kIndexMostKeys,
              "plans count with these");

template <class T>
struct SearchInstance {
  void (*kernel)(SearchParams<T>);
  int shared_bytes;
};

template <class T>
SearchInstance<T> instance_of(const CudaSearchPlan& plan) {
#define RESONA_MATCH(Element, kPinned, kPerLane)                   \
  if constexpr (std::is_same_v<Element, T>)                        \
    if (plan.pinned == kPinned && plan.bag_per_lane == kPerLane) { \
      using Config = SearchConfig<T, kPinned, kPerLane>;           \
      return {search_kernel<Config>, Config::kSharedBytes};        \
    }
  RESONA_SEARCH_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error("resona::cuda: search_kernel: the plan names an instance that does not exist");
}

// One call: what all its launches share.
template <class T>
struct Search {
  const RetrieveProblem& problem;
  const CudaSearchPlan& plan;
  SearchArrays arrays;
  PackedSequences packed;
  Stream stream;

  template <class Parameters>
  void launch_next(const char* name, int64_t blocks, int threads, void (*kernel)(Parameters),
                   const Parameters& parameters, int shared_bytes = 0) const {
    launch({name, {blocks}, threads, shared_bytes, true, plan.reason}, stream, kernel, parameters);
  }

  SearchOperand<T> query() const { return search_operand<T>(problem.query, problem.shape.retrieval_dim); }
  SearchOperand<T> chunk() const { return search_operand<T>(problem.chunks, problem.shape.retrieval_dim); }

  void find_norms() const {
    const Shape& s = problem.shape;
    SearchNormsParams<T> p{};
    p.chunk = chunk();
    p.batch = s.batch, p.heads = s.retrieval_heads, p.chunks = s.context / s.chunk_size,
    p.dim = s.retrieval_dim;
    p.norms = arrays.norms, p.tickets = arrays.tickets, p.ticket_count = plan.tickets();
    launch_next("search_norms_kernel", plan.norm_blocks, SearchNormsConfig::kThreads, search_norms_kernel<T>,
                p);
  }

  void find(const SearchRows& rows) const {
    const SearchInstance<T> instance = instance_of<T>(plan);
    launch_next("search_kernel", rows.tiles * plan.splits, kSearchThreads, instance.kernel,
                search_params<T>(problem, plan, arrays, rows), instance.shared_bytes);
  }

  void score_all(const SearchRows& rows) const {
    launch_next("search_exact_kernel", plan.exact_blocks, SearchExactConfig::kThreads, search_exact_kernel<T>,
                {rows, query(), chunk(), search_results(problem), arrays.keys});
  }

  void run() const {
    if (plan.norms) find_norms();
    SearchRows rows = search_rows_of(problem.shape, packed);
    for (rows.first_tile = 0; rows.first_tile < plan.tiles; rows.first_tile += plan.window_tiles) {
      const int64_t left = plan.tiles - rows.first_tile;
      rows.tiles = left < plan.window_tiles ? left : plan.window_tiles;
      plan.candidates ? find(rows) : score_all(rows);
    }
  }
};

}  // namespace

void retrieve(const RetrieveProblem& p, const CudaSearchPlan& plan, void* memory, Stream stream) {
  Workspace workspace(memory);
  int32_t* chunk_begin = take_chunk_begin(plan.sequences, workspace);
  retrieve(p, plan, find_chunks(p.packed, p.shape, chunk_begin, stream), workspace, stream);
}

void retrieve(const RetrieveProblem& p, const CudaSearchPlan& plan, const PackedSequences& packed,
              Workspace workspace, Stream stream) {
  const SearchArrays arrays = take_search(plan, p.shape, workspace);
  with_element(p.query.dtype,
               [&](auto element) { Search<decltype(element)>{p, plan, arrays, packed, stream}.run(); });
}

}  // namespace resona::cuda
