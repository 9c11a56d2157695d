// A decode step: two launches, or three, chained by programmatic dependent launch and fit for a graph.
//
//   decode_search_kernel              appends the tokens | scores the closed chunks, or the centroids
//   decode_refine_kernel              after centroids: scores the chunks of the best
//   decode_lanes_ / decode_mma_kernel selects, attends, counts the tokens
//
// Nothing waits for the host. Lengths are read where they lie, by all launches as they were before the step:
// the others get them from the first, and the last one writes the new ones.
#include "cuda/decode.h"

#include <stdexcept>
#include <type_traits>

#include "cuda/attend_launch.cuh"
#include "cuda/decode_attend.cuh"
#include "cuda/decode_refine.cuh"
#include "cuda/decode_search.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"

namespace resona::cuda {
namespace {

static_assert(kDecodeThreads == kDecodeAttendThreads && kDecodeSharedSlots == kDecodeSlotsInShared,
              "plans count with these");

template <class T>
HeadRows<T> rows_to_write(const MutableRows& r) {
  return {static_cast<T*>(r.data), r.batch_stride, r.token_stride, r.head_stride};
}

DecodeCopy copy_of(const Rows& from, const MutableRows& to) {
  const int64_t size = size_of(from.dtype);
  return {static_cast<const unsigned char*>(from.data),
          from.batch_stride * size,
          from.head_stride * size,
          static_cast<unsigned char*>(to.data),
          to.batch_stride * size,
          to.token_stride * size,
          to.head_stride * size};
}

template <class T>
DecodeAppendParams<T> append_params(const DecodeProblem& p, const CudaDecodePlan& plan) {
  const Shape& s = p.shape;
  DecodeAppendParams<T> a{};
  a.key = copy_of(p.key, p.key_cache), a.value = copy_of(p.value, p.value_cache);
  a.kv_heads = static_cast<int>(s.kv_heads);
  a.row_bytes = s.head_dim * size_of(p.key.dtype);
  a.vector = plan.vector_rows;
  a.context = head_rows<T>(p.context_embedding);
  a.history = rows_to_write<T>(p.history), a.history_rows = p.history_rows;
  a.chunks = rows_to_write<T>(p.chunks);
  a.open_sum = static_cast<float*>(p.open_sum);
  a.heads = s.retrieval_heads, a.dim = s.retrieval_dim, a.chunk_size = s.chunk_size;
  if (!p.two_level()) return a;
  a.superchunks = rows_to_write<T>(p.superchunks);
  a.superchunk_sum = static_cast<float*>(p.superchunk_sum);
  a.superchunk_size = p.superchunk_size;
  return a;
}

template <class T>
DecodeScoreParams<T> score_params(const DecodeProblem& p, const MutableRows& rows, bool vector,
                                  const CudaDecodeRanges& ranges, uint64_t* keys) {
  DecodeScoreParams<T> a{};
  a.query = head_rows<T>(p.query_embedding);
  a.rows = {static_cast<const T*>(rows.data), rows.batch_stride, rows.token_stride, rows.head_stride};
  a.heads = p.shape.retrieval_heads, a.dim = p.shape.retrieval_dim;
  a.range = ranges.range, a.lists = ranges.lists, a.kept = ranges.kept;
  a.vector = vector;
  a.keys = keys;
  return a;
}

template <class T>
void search(const DecodeProblem& p, const CudaDecodePlan& plan, const DecodeArrays& arrays, Stream stream) {
  using Config = DecodeSearchConfig<T>;
  static_assert(Config::kThreads == kDecodeThreads && Config::kMostRange == kDecodeMostRange &&
                    kDecodeMostRange % Config::kTile == 0,
                "plans count with these");
  DecodeSearchParams<T> k{};
  k.append = append_params<T>(p, plan);
  k.score = plan.probes
                ? score_params<T>(p, p.superchunks, plan.vector_chunks, plan.centroids, arrays.centroid_keys)
                : score_params<T>(p, p.chunks, plan.vector_chunks, plan.chunks, arrays.keys);
  k.span = p.shape.chunk_size * plan.superchunk_size;
  k.lengths = p.lengths;
  k.batch = p.shape.batch, k.capacity = p.shape.context;
  k.positions = arrays.positions;
  k.tickets = arrays.tickets, k.tickets_per_batch = k.batch == 0 ? 0 : plan.rows / k.batch;
  launch({"decode_search_kernel", {plan.search_blocks}, Config::kThreads, 0, true, plan.reason}, stream,
         decode_search_kernel<Config>, k);
}

template <class T>
void refine(const DecodeProblem& p, const CudaDecodePlan& plan, const DecodeArrays& arrays, Stream stream) {
  using Config = DecodeRefineConfig<T>;
  DecodeRefineParams<T> k{};
  k.score = score_params<T>(p, p.chunks, plan.vector_chunks, plan.chunks, arrays.keys);
  k.chunk_size = p.shape.chunk_size;
  k.superchunk_size = plan.superchunk_size, k.probes = plan.probed;
  k.keys = arrays.centroid_keys;
  k.range = plan.centroids.range, k.lists = plan.centroids.lists, k.kept = plan.centroids.kept;
  k.positions = arrays.positions;
  launch({"decode_refine_kernel", {plan.refine_blocks}, Config::kThreads, 0, true, plan.reason}, stream,
         decode_refine_kernel<Config>, k);
}

// ---- attention

template <class T>
struct DecodeInstance {
  const char* name;
  void (*kernel)(DecodeAttendParams<T>);
  int split_bytes;
  int64_t partial_floats;
};

template <class T>
DecodeInstance<T> instance_of(const CudaDecodePlan& plan) {
#define RESONA_MATCH(Element, kLanes, kHeads, kVector)                                 \
  if constexpr (std::is_same_v<Element, T>)                                            \
    if (!plan.tensor_cores && plan.dim == 8 * kLanes && plan.heads == kHeads &&        \
        plan.vector_rows == kVector) {                                                 \
      using Config = AttendQueryConfig<T, kLanes, kHeads, kVector>;                    \
      return {"decode_lanes_kernel", decode_lanes_kernel<Config>, Config::kSplitBytes, \
              QueryState<Config>::kFloats * kLanes};                                   \
    }
  RESONA_DECODE_LANES_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
#define RESONA_MATCH(Element, kDim, kHeadTiles)                                    \
  if constexpr (std::is_same_v<Element, T>)                                        \
    if (plan.tensor_cores && plan.dim == kDim && plan.heads == 8 * kHeadTiles) {   \
      using Config = AttendQueryMmaConfig<T, kDim, kHeadTiles>;                    \
      return {"decode_mma_kernel", decode_mma_kernel<Config>, Config::kSplitBytes, \
              QueryPartial<Config::kRows, Config::kValues>::kFloats * kWarpSize};  \
    }
  RESONA_ATTEND_QUERY_MMA_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  throw std::logic_error("resona::cuda: decode_step: the plan names an instance that does not exist");
}

Rows read_only(const MutableRows& r) {
  return {r.data, r.batch_stride, r.token_stride, r.head_stride, r.dtype};
}

template <class T>
AttendParams<T> attend_params_of(const DecodeProblem& p, const CudaDecodePlan& plan) {
  AttendProblem attend{};
  attend.shape = p.shape;
  attend.query = p.query, attend.key = read_only(p.key_cache), attend.value = read_only(p.value_cache);
  attend.bias_scale = p.score_scale;
  attend.sink = p.sink;
  attend.scale = p.scale;
  attend.out = p.out, attend.lse = p.lse;
  CudaAttendPlan query_plan{};
  query_plan.vector = plan.vector_rows;
  return attend_params<T>(attend, query_plan, PackedSequences{});
}

template <class T>
void attend(const DecodeProblem& p, const CudaDecodePlan& plan, const DecodeArrays& arrays, Stream stream) {
  const DecodeInstance<T> i = instance_of<T>(plan);
  if (i.partial_floats != decode_partial_floats(plan))
    throw std::logic_error("resona::cuda: decode_step: the plan counts other partial results");
  DecodeAttendParams<T> k{};
  k.attend = attend_params_of<T>(p, plan);
  k.keys = arrays.keys;
  k.range = plan.chunks.range, k.lists = plan.chunks.lists, k.kept = plan.chunks.kept;
  k.superchunk_size = plan.superchunk_size, k.probes = plan.probed;
  k.positions = arrays.positions, k.lengths = p.lengths;
  k.indices = p.indices, k.scores = static_cast<float*>(p.scores);
  k.tickets = arrays.tickets, k.partials = arrays.partials;
  k.slots = arrays.slots, k.slot_count = plan.slots;
  k.splits = static_cast<int>(plan.splits);
  launch({i.name, {plan.attend_blocks()}, static_cast<int>(kDecodeThreads), i.split_bytes, true, plan.reason},
         stream, i.kernel, k);
}

}  // namespace

void decode_step(const DecodeProblem& p, const CudaDecodePlan& plan, void* memory, Stream stream) {
  Workspace workspace(memory);
  const DecodeArrays arrays = take_decode(plan, p.shape, workspace);
  with_element(p.query_embedding.dtype, [&](auto element) {
    search<decltype(element)>(p, plan, arrays, stream);
    if (plan.probes) refine<decltype(element)>(p, plan, arrays, stream);
  });
  with_element(p.query.dtype, [&](auto element) { attend<decltype(element)>(p, plan, arrays, stream); });
}

}  // namespace resona::cuda
