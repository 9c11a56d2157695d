#include "cuda/attend_chunk.cuh"

#include <stdexcept>
#include <type_traits>

#include "cuda/attend_launch.cuh"
#include "cuda/attend_merge.cuh"
#include "cuda/build_index.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/stages.h"

namespace resona::cuda {
namespace {

template <class Params>
struct Instance {
  void (*kernel)(Params);
  int threads;
  int64_t shared_bytes;
};

template <class T>
Instance<AttendChunkParams<T>> chunk_instance(const CudaAttendPlan& plan) {
#define RESONA_MATCH(Element, kDim)                                                                   \
  if constexpr (std::is_same_v<Element, T>)                                                           \
    if (plan.dim == kDim) {                                                                           \
      using Config = AttendChunkConfig<T, kDim>;                                                      \
      return {attend_chunk_kernel<Config>, Config::kThreads,                                          \
              Config::shared_bytes(static_cast<int>(plan.key_rows), static_cast<int>(plan.key_slots), \
                                   plan.ahead)};                                                      \
    }
  RESONA_ATTEND_CHUNK_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error("resona::cuda: attend_chunk_kernel: the plan names an instance that does not exist");
}

template <class T, class P>
Instance<AttendMergeParams<T, P>> merge_instance(const CudaAttendPlan& plan) {
#define RESONA_MATCH(Element, Partial, kDim)                              \
  if constexpr (std::is_same_v<Element, T> && std::is_same_v<Partial, P>) \
    if (plan.dim == kDim) {                                               \
      using Config = AttendMergeConfig<T, P, kDim>;                       \
      return {attend_merge_kernel<Config>, Config::kThreads, 0};          \
    }
  RESONA_ATTEND_MERGE_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error("resona::cuda: attend_merge_kernel: the plan names an instance that does not exist");
}

// Queries [begin, begin + count) of batch entries [first, first + batch); all of them if batch > 1.
struct QueryRange {
  int64_t first, batch, begin, count;
};

// One call: what the launches of all ranges share.
template <class T>
struct ChunkAttention {
  const AttendProblem& problem;
  const CudaAttendPlan& plan;
  AttendArrays arrays;
  PackedSequences packed;
  Stream stream;

  // The range as a problem of its own, except for where its queries stand.
  AttendParams<T> params_of(const QueryRange& range) const {
    const Shape& s = problem.shape;
    AttendParams<T> a = attend_params<T>(problem, plan, packed);
    const int64_t row = range.first * s.queries + range.begin;
    a.batch = range.batch, a.queries = range.count;
    a.query.data = a.query.at(range.first, range.begin, 0);
    a.key.data = a.key.at(range.first, 0, 0), a.value.data = a.value.at(range.first, 0, 0);
    a.indices += row * s.retrieval_heads * s.top_k;
    if (a.bias) a.bias += row * s.retrieval_heads * s.top_k;
    a.out += row * s.heads * s.head_dim;
    a.lse += row * s.heads;
    return a;
  }

  IndexArrays index_of(const QueryRange& range, const AttendParams<T>& a, Workspace& workspace) const {
    const Shape& s = problem.shape;
    IndexProblem index{};
    index.shape = s;
    index.shape.batch = range.batch, index.shape.queries = range.count;
    index.indices = a.indices;
    index.packed = packed;
    index.rows_per_query = a.group(), index.tile_rows = plan.item_rows;
    index.tile_counts = problem.tile_counts;
    index.queries_before = range.begin, index.queries_behind = s.queries - range.begin - range.count;
    const bool is_full = range.count == plan.range_queries && range.batch == plan.range_batch;
    return build_index(index, is_full ? plan.index : plan.last_index, workspace, stream);
  }

  AttendChunkParams<T> chunk_params(const AttendParams<T>& a, const IndexArrays& index) const {
    const bool final = a.top_k == 1;
    AttendChunkParams<T> p{};
    p.attend = a;
    p.list = index.list, p.position = index.position, p.offsets = index.offsets;
    p.tile_begin = index.tile_begin, p.tile_totals = index.tile_totals;
    p.partial = arrays.partial, p.partial_lse = arrays.partial_lse, p.partial_scale = arrays.partial_scale;
    p.slots = a.batch * a.queries * a.retrieval_heads * a.top_k;
    p.keys = a.batch * a.retrieval_heads * a.chunks;
    p.kv_count = a.kv_heads / a.retrieval_heads;
    p.result = final                ? AttendResult::kFinal
               : plan.half_partials ? AttendResult::kPartialHalf
                                    : AttendResult::kPartialFloat;
    p.item_rows = static_cast<int>(plan.item_rows);
    p.key_rows = static_cast<int>(plan.key_rows), p.key_slots = static_cast<int>(plan.key_slots);
    p.ahead = plan.ahead;
    return p;
  }

  void attend(const AttendChunkParams<T>& p) const {
    const auto i = chunk_instance<T>(plan);
    launch({"attend_chunk_kernel", {plan.blocks}, i.threads, i.shared_bytes, true, plan.reason}, stream,
           i.kernel, p);
  }

  template <class P>
  void merge(const AttendChunkParams<T>& c, int kv_first) const {
    const AttendMergeParams<T, P> p{c.attend,      c.position,      static_cast<const P*>(c.partial),
                                    c.partial_lse, c.partial_scale, c.slots,
                                    kv_first,      c.kv_count};
    const auto i = merge_instance<T, P>(plan);
    launch({"attend_merge_kernel", {plan.merge_blocks}, i.threads, 0, true, plan.reason}, stream, i.kernel,
           p);
  }

  void merge(const AttendChunkParams<T>& c, int kv_first) const {
    if constexpr (sizeof(T) == 2)
      if (plan.half_partials) return merge<Half>(c, kv_first);
    merge<float>(c, kv_first);
  }

  // attend_chunk_kernel takes the first heads there are, having no register for where they begin.
  void run(const QueryRange& range, Workspace workspace) const {
    const AttendParams<T> a = params_of(range);
    const AttendChunkParams<T> whole = chunk_params(a, index_of(range, a, workspace));
    if (whole.result == AttendResult::kFinal) return attend(whole);
    const int most = static_cast<int>(plan.range_heads);
    for (int first = 0; first < whole.kv_count; first += most) {
      AttendChunkParams<T> p = whole;
      p.kv_count = whole.kv_count - first < most ? whole.kv_count - first : most;
      p.attend.query.data = a.query.at(0, 0, first * a.group());
      p.attend.key.data = a.key.at(0, 0, first), p.attend.value.data = a.value.at(0, 0, first);
      attend(p);
      merge(p, first);
    }
  }
};

}  // namespace

void attend_chunk(const AttendProblem& p, const CudaAttendPlan& plan, const PackedSequences& packed,
                  Workspace workspace, Stream stream) {
  const AttendArrays arrays = take_attend(plan, p.shape, workspace);
  with_element(p.query.dtype, [&](auto element) {
    const ChunkAttention<decltype(element)> attention{p, plan, arrays, packed, stream};
    for (int64_t first = 0; first < p.shape.batch; first += plan.range_batch)
      for (int64_t begin = 0; begin < p.shape.queries; begin += plan.range_queries) {
        const int64_t left = p.shape.queries - begin, batches = p.shape.batch - first;
        attention.run({first, batches < plan.range_batch ? batches : plan.range_batch, begin,
                       left < plan.range_queries ? left : plan.range_queries},
                      workspace);
      }
  });
}

}  // namespace resona::cuda
