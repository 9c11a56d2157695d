// The chunk-stationary attention from the selection to the result: index, attend, merge, range after range.
#include "cuda/attend_chunk.cuh"

#include "cuda/attend_merge.cuh"
#include "cuda/build_index.cuh"
#include "kernels/attend_arguments.h"
#include "kernels/stage_arguments.h"

namespace {

using namespace resona::cuda;

template <class T, int kDim>
void launch_attend(const AttendChunkParams<T>& p, int64_t blocks) {
  using Config = AttendChunkConfig<T, kDim>;
  AttendChunkParams<T> q = p;
  const int64_t keys = p.attend.chunk_size < Config::kKeys ? p.attend.chunk_size : Config::kKeys;
  q.key_rows = static_cast<int>((keys + 15) / 16 * 16);
  const int64_t shared = Config::shared_bytes(q.key_rows, q.key_slots, q.ahead);
  simt::launch({"attend_chunk_kernel", dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads),
                static_cast<size_t>(shared), true},
               [q] { attend_chunk_kernel<Config>(q); });
}

template <class T>
void dispatch_attend(const AttendChunkParams<T>& p, int64_t blocks) {
#define LAUNCH(Element, kDim)                                                \
  if constexpr (std::is_same_v<Element, T>) {                                \
    if (p.attend.head_dim <= kDim) return launch_attend<T, kDim>(p, blocks); \
  }
  RESONA_ATTEND_CHUNK_INSTANCES(LAUNCH)
#undef LAUNCH
  throw std::invalid_argument("attend_chunk: no instance for this head_dim");
}

template <class T, class P>
void dispatch_merge(const AttendChunkParams<T>& c, int64_t blocks) {
  const AttendMergeParams<T, P> p{
      c.attend, c.position, static_cast<const P*>(c.partial), c.partial_lse, c.partial_scale, c.slots,
      0,        c.kv_count};
#define LAUNCH(Element, Partial, kDim)                                                                   \
  if constexpr (std::is_same_v<Element, T> && std::is_same_v<Partial, P>) {                              \
    using Config = AttendMergeConfig<Element, Partial, kDim>;                                            \
    if (p.attend.head_dim <= kDim)                                                                       \
      return simt::launch(                                                                               \
          {"attend_merge_kernel", dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), 0, true}, \
          [p] { attend_merge_kernel<Config>(p); });                                                      \
  }
  RESONA_ATTEND_MERGE_INSTANCES(LAUNCH)
#undef LAUNCH
  throw std::invalid_argument("attend_merge: no instance for this head_dim");
}

// The problem of queries [begin, end) of a batch entry, as attend_chunk.cuh describes it.
template <class T>
AttendParams<T> range_of(const AttendParams<T>& whole, int64_t batch, int64_t begin, int64_t end) {
  AttendParams<T> p = whole;
  const int64_t row = batch * whole.queries + begin;
  p.batch = 1, p.queries = end - begin;
  p.query.data = whole.query.at(batch, begin, 0);
  p.key.data = whole.key.at(batch, 0, 0), p.value.data = whole.value.at(batch, 0, 0);
  p.indices += row * p.retrieval_heads * p.top_k;
  if (p.bias) p.bias += row * p.retrieval_heads * p.top_k;
  p.out += row * p.heads * p.head_dim, p.lse += row * p.heads;
  return p;
}

template <class T>
resona::IndexArrays index_of(const simt::Arguments& a, const AttendChunkParams<T>& p, int64_t before,
                             int64_t behind) {
  const AttendParams<T>& t = p.attend;
  resona::Shape s{};
  s.batch = t.batch, s.queries = t.queries, s.context = t.context, s.retrieval_heads = t.retrieval_heads;
  s.chunk_size = t.chunk_size, s.top_k = t.top_k;
  const resona::CudaIndexPlan plan = plan_index_cuda(s, stages::kDevice);
  resona::Workspace workspace(stages::workspace_of(a, plan.workspace_bytes));
  return build_index({s, t.indices, t.packed, t.group(), p.item_rows, before, behind}, plan, workspace, {});
}

template <class T>
void run_range(const simt::Arguments& a, const AttendParams<T>& problem, int64_t before, int64_t behind) {
  AttendChunkParams<T> p{};
  p.attend = problem;
  p.slots = problem.batch * problem.queries * problem.retrieval_heads * problem.top_k;
  p.keys = problem.batch * problem.retrieval_heads * problem.chunks;
  p.kv_count = problem.kv_heads / problem.retrieval_heads;
  p.item_rows = static_cast<int>(a.integer("item_rows"));
  const resona::IndexArrays index = index_of(a, p, before, behind);
  p.list = index.list, p.position = index.position, p.offsets = index.offsets;
  p.tile_begin = index.tile_begin, p.tile_totals = index.tile_totals;
  p.key_slots = static_cast<int>(a.integer("key_slots"));
  p.ahead = a.integer("ahead") != 0;
  const std::string& result = a.text("result");
  p.result = result == "final"  ? AttendResult::kFinal
             : result == "half" ? AttendResult::kPartialHalf
                                : AttendResult::kPartialFloat;
  const int64_t blocks = a.integer("blocks");
  if (p.result == AttendResult::kFinal) return dispatch_attend(p, blocks);
  p.partial_lse = a.array<float>("partial_lse");
  if constexpr (sizeof(T) == 2) {
    if (p.result == AttendResult::kPartialHalf) {
      p.partial = a.array<Half>("partial");
      p.partial_scale = a.array<float>("partial_scale");
      dispatch_attend(p, blocks);
      return dispatch_merge<T, Half>(p, blocks);
    }
  }
  p.partial = a.array<float>("partial");
  dispatch_attend(p, blocks);
  dispatch_merge<T, float>(p, blocks);
}

template <class T>
void run_of(const simt::Arguments& a) {
  const AttendParams<T> whole = simt::attend_params<T>(a);
  const int64_t range = a.integer("range");
  if (range == 0) return run_range(a, whole, 0, 0);
  for (int64_t b = 0; b < whole.batch; ++b)
    for (int64_t begin = 0; begin < whole.queries; begin += range) {
      const int64_t end = begin + range < whole.queries ? begin + range : whole.queries;
      run_range(a, range_of(whole, b, begin, end), begin, whole.queries - end);
    }
}

void run(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  if (dtype == "float32") return run_of<float>(a);
  if (dtype == "float16") return run_of<Half>(a);
  run_of<BFloat16>(a);
}

const simt::Registration registration("attend_chunk", run);

}  // namespace
