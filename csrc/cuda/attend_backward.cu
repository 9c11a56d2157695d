#include "cuda/attend_backward.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/attend_backward.cuh"
#include "cuda/attend_backward_keys.cuh"
#include "cuda/attend_backward_lanes.cuh"
#include "cuda/attend_backward_rows.cuh"
#include "cuda/build_index.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed.cuh"

namespace resona::cuda {
namespace {

using RowConfig = AttendBackwardRowConfig;
static_assert(RowConfig::kThreads == kAttendBackwardRowThreads && RowConfig::kSinkRows == kAttendSinkRows,
              "plans count with these");

template <class T>
struct BackwardInstance {
  const char* name;
  void (*kernel)(AttendBackwardParams<T>);
  int threads, shared_bytes;
};

[[noreturn]] void no_instance() {
  throw std::logic_error(
      "resona::cuda: attend_backward_kernel: the plan names an instance that does not exist");
}

template <class T>
BackwardInstance<T> tile_instance(const CudaAttendBackwardPlan& plan) {
#define RESONA_MATCH(Element, kWidth)                                                     \
  if constexpr (std::is_same_v<Element, T>) {                                             \
    using Config = AttendBackwardConfig<T, kWidth>;                                       \
    if (plan.width == kWidth && plan.tile == Config::kTile)                               \
      return {"attend_backward_kernel", attend_backward_kernel<Config>, Config::kThreads, \
              Config::kSharedBytes};                                                      \
  }
  RESONA_ATTEND_BACKWARD_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  no_instance();
}

template <class T>
BackwardInstance<T> lanes_instance(const CudaAttendBackwardPlan& plan) {
#define RESONA_MATCH(Element, kPerLane, kKeys)                                                            \
  if constexpr (std::is_same_v<Element, T>) {                                                             \
    using Config = AttendBackwardLanesConfig<T, kPerLane, kKeys>;                                         \
    if (plan.width == Config::kDim && plan.lane_keys == kKeys)                                            \
      return {"attend_backward_lanes_kernel", attend_backward_lanes_kernel<Config>, Config::kThreads, 0}; \
  }
  RESONA_ATTEND_BACKWARD_LANES_INSTANCES(RESONA_MATCH)
#undef RESONA_MATCH
  no_instance();
}

template <class T>
BackwardInstance<T> instance_of(const CudaAttendBackwardPlan& plan) {
  static_assert(AttendBackwardConfig<T, 64>::kMostSegment == kAttendBackwardMostSegment,
                "plans count with these");
  if (plan.segment > kAttendBackwardMostSegment)
    throw std::logic_error("resona::cuda: attend_backward_kernel: the plan counts with longer segments");
  return plan.lane_keys > 0 ? lanes_instance<T>(plan) : tile_instance<T>(plan);
}

// Rows of a tensor from (batch, token) on.
template <class T, class AnyRows>
HeadRows<T> rows_from(const AnyRows& r, int64_t batch, int64_t token) {
  return {static_cast<T*>(r.data) + batch * r.batch_stride + token * r.token_stride, r.batch_stride,
          r.token_stride, r.head_stride};
}

// Where a part begins.
struct Corner {
  int64_t batch, query;
};

// One call: what all its launches share.
template <class T>
struct AttendBackward {
  const AttendBackwardProblem& problem;
  const CudaAttendBackwardPlan& plan;
  AttendBackwardArrays arrays;
  PackedSequences packed;
  Workspace index_memory;
  Stream stream;

  const Shape& shape() const { return problem.forward.shape; }

  template <class Parameters>
  void launch_next(const char* name, int64_t blocks, int threads, void (*kernel)(Parameters),
                   const Parameters& parameters, int shared_bytes = 0) const {
    launch({name, {blocks}, threads, shared_bytes, true, plan.reason}, stream, kernel, parameters);
  }

  int64_t row_blocks(int64_t items, int64_t lanes) const {
    return std::min((items * lanes + RowConfig::kThreads - 1) / RowConfig::kThreads, plan.row_blocks);
  }

  // As attend_backward_rows.cuh has it.
  int64_t lanes() const {
    int64_t lanes = 4;
    while (lanes * RowConfig::kPerLane < shape().head_dim) lanes *= 2;
    return lanes;
  }

  AttendParams<T> attend_params(const Shape& part, Corner at) const {
    const AttendProblem& f = problem.forward;
    const Shape& s = shape();
    const int64_t row = at.batch * s.queries + at.query, slot = row * s.retrieval_heads * s.top_k;
    AttendParams<T> a{};
    a.query = rows_from<const T>(f.query, at.batch, at.query);
    a.key = rows_from<const T>(f.key, at.batch, 0);
    a.value = rows_from<const T>(f.value, at.batch, 0);
    a.indices = f.indices + slot;
    a.bias = f.bias == nullptr ? nullptr : static_cast<const float*>(f.bias) + slot;
    a.bias_scale = static_cast<const float*>(f.bias_scale);
    a.sink = static_cast<const float*>(f.sink);
    a.lse = static_cast<float*>(f.lse) + row * s.heads;
    a.batch = part.batch, a.queries = part.queries, a.context = part.context;
    a.chunk_size = s.chunk_size, a.chunks = part.context / s.chunk_size, a.top_k = s.top_k;
    a.heads = static_cast<int>(s.heads), a.kv_heads = static_cast<int>(s.kv_heads);
    a.retrieval_heads = static_cast<int>(s.retrieval_heads), a.head_dim = static_cast<int>(s.head_dim);
    a.scale = static_cast<float>(f.scale);
    a.vector = plan.vector;
    a.packed = packed;
    return a;
  }

  AttendBackwardParams<T> params(const Shape& part, Corner at) const {
    const Shape& s = shape();
    const int64_t row = at.batch * s.queries + at.query;
    AttendBackwardParams<T> p{};
    p.attend = attend_params(part, at);
    p.out = rows_from<const T>(problem.forward.out, at.batch, at.query);
    p.out_gradient = rows_from<const T>(problem.out_gradient, at.batch, at.query);
    if (problem.lse_gradient != nullptr)
      p.lse_gradient = static_cast<const float*>(problem.lse_gradient) + row * s.heads;
    p.query_gradient = rows_from<T>(problem.query_gradient, at.batch, at.query);
    p.key_gradient = rows_from<T>(problem.key_gradient, at.batch, 0);
    p.value_gradient = rows_from<T>(problem.value_gradient, at.batch, 0);
    if (problem.bias_gradient != nullptr)
      p.bias_gradient = static_cast<float*>(problem.bias_gradient) + row * s.retrieval_heads * s.top_k;
    p.delta = arrays.delta + at.query * s.heads;
    p.factor = plan.normalise ? arrays.factor + at.query * s.heads : nullptr;
    p.query_partial = arrays.query_partial, p.row_sums = arrays.row_sums, p.slab = arrays.slab;
    p.carried = arrays.carried;
    p.segment = static_cast<int>(plan.segment);
    p.slab_rows = plan.slab_rows;
    return p;
  }

  void find_lists(AttendBackwardParams<T>& p, const Shape& part, int64_t first_query) const {
    const int64_t behind = shape().queries - first_query - part.queries;
    const IndexProblem index{part,         p.attend.indices, packed, part.heads / part.kv_heads,
                             plan.segment, first_query,      behind};
    const CudaIndexPlan index_plan = plan_index_cuda(part, plan.device);
    Workspace memory = index_memory;
    const IndexArrays lists = build_index(index, index_plan, memory, stream);
    p.list = lists.list, p.list_slots = lists.sorted_slots, p.position = lists.position;
    p.offsets = lists.offsets, p.tile_begin = lists.tile_begin, p.tile_totals = lists.tile_totals;
    p.slots = index_plan.slots, p.keys = index_plan.keys;
  }

  void clear_carried(const AttendBackwardParams<T>& p) const {
    const Shape& s = shape();
    const int64_t rows = s.context * s.retrieval_heads * p.heads, pitch = (s.head_dim + 7) / 8 * 8;
    launch_next("attend_clear_kernel", row_blocks(rows, pitch / 2), RowConfig::kThreads, attend_clear_kernel,
                AttendClearParams{p.carried, rows * 2 * pitch});
  }

  void run_heads(AttendBackwardParams<T> p) const {
    const BackwardInstance<T> instance = instance_of<T>(plan);
    const Shape& s = shape();
    const auto run_items = [&] {
      launch_next(instance.name, plan.item_blocks, instance.threads, instance.kernel, p,
                  instance.shared_bytes);
    };
    const int64_t rows = p.attend.batch * p.attend.queries * s.retrieval_heads * p.heads * p.attend.group();
    if (plan.normalise) {
      p.only_sums = true;
      run_items();
      p.only_sums = false;
      launch_next("attend_factor_kernel", row_blocks(rows, 1), RowConfig::kThreads, attend_factor_kernel<T>,
                  p);
    }
    run_items();
    launch_next("attend_query_gradient_kernel", row_blocks(rows, lanes()), RowConfig::kThreads,
                attend_query_gradient_kernel<T>, p);
    if (p.bias_gradient != nullptr)
      launch_next("attend_bias_gradient_kernel", row_blocks(p.slots, 1), RowConfig::kThreads,
                  attend_bias_gradient_kernel<T>, p);
    const int64_t tokens = p.attend.batch * s.context * s.retrieval_heads * p.heads;
    launch_next("attend_key_gradient_kernel", row_blocks(tokens, lanes()), RowConfig::kThreads,
                attend_key_gradient_kernel<T>, p);
  }

  void add_sink(const AttendParams<T>& a, int64_t first_batch) const {
    AttendSinkParams<T> p{a, arrays.delta, plan.normalise ? arrays.factor : nullptr, nullptr, 0};
    p.tiles = (a.queries + kAttendSinkRows - 1) / kAttendSinkRows;
    p.sums = arrays.sink_sums + first_batch * p.tiles * a.heads;
    launch_next("attend_sink_rows_kernel", row_blocks(p.rows_of_sums() * a.heads, kWarpSize),
                RowConfig::kThreads, attend_sink_rows_kernel<T>, p);
  }

  void run_batch(int64_t batch) const {
    const Shape& s = shape();
    Shape whole = s;
    whole.batch = std::min(plan.batch, s.batch - batch);
    const AttendBackwardParams<T> rows = params(whole, {batch, 0});
    launch_next("attend_delta_kernel", row_blocks(whole.batch * s.queries * s.heads, lanes()),
                RowConfig::kThreads, attend_delta_kernel<T>, rows);
    const int64_t heads_of_list = s.kv_heads / s.retrieval_heads;
    for (int64_t head = 0; head < heads_of_list; head += plan.heads)
      for (int64_t query = 0; query == 0 || query < s.queries; query += plan.queries) {
        const Shape part = part_of(plan, s, batch, query);
        AttendBackwardParams<T> p = params(part, {batch, query});
        p.first_head = static_cast<int>(head);
        p.heads = static_cast<int>(std::min(plan.heads, heads_of_list - head));
        p.last_range = query + plan.queries >= s.queries;
        if (p.carried != nullptr && query == 0) clear_carried(p);
        find_lists(p, part, query);
        run_heads(p);
      }
    if (problem.sink_gradient != nullptr) add_sink(rows.attend, batch);
  }

  void run() const {
    const Shape& s = shape();
    for (int64_t batch = 0; batch < s.batch; batch += plan.batch) run_batch(batch);
    if (problem.sink_gradient == nullptr) return;
    const int64_t tiles = (s.queries + kAttendSinkRows - 1) / kAttendSinkRows;
    const AttendSinkSumParams p{arrays.sink_sums, static_cast<float*>(problem.sink_gradient), s.batch * tiles,
                                static_cast<int>(s.heads)};
    launch_next("attend_sink_gradient_kernel", row_blocks(s.heads, 1), RowConfig::kThreads,
                attend_sink_gradient_kernel, p);
  }
};

}  // namespace

void attend_backward(const AttendBackwardProblem& p, const CudaAttendBackwardPlan& plan, void* memory,
                     Stream stream) {
  const AttendProblem& f = p.forward;
  if (f.bias != nullptr && (f.bias_dtype != DType::kFloat32 || !plan.normalise))
    throw std::logic_error("resona::cuda: attend_backward: expected a float32 bias that the plan knows of");
  Workspace workspace(memory);
  const AttendBackwardArrays arrays = take_attend_backward(plan, f.shape, workspace);
  const PackedSequences packed = find_chunks(f.packed, f.shape, arrays.chunk_begin, stream);
  with_element(f.query.dtype, [&](auto element) {
    AttendBackward<decltype(element)>{p, plan, arrays, packed, workspace, stream}.run();
  });
}

}  // namespace resona::cuda
