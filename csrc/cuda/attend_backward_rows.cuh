// Gradients of attention, row by row: what stands before and behind attend_backward.cuh.
//
//   attend_delta_kernel             delta = <d out, out> - d lse                          lanes: a row
//   attend_factor_kernel            1 / (sums of its slots, in order, + e^(sink - lse))   thread: a row
//   attend_query_gradient_kernel    scale * sum of the partials of its slots, in order    lanes: a row
//   attend_bias_gradient_kernel     sum over the heads of a slot, in order                thread: a slot
//   attend_sink_rows_kernel         - sum over 512 rows of e^(sink - lse) factor delta    warp: a head
//   attend_sink_gradient_kernel     sum of those, in order                                thread: a head
//
// All memory time. Bytes per row of the output: delta 2 D of d out and of out; query gradient 4 k D of
// partials and 2 D written. No block waits for another.
#pragma once

#include "cuda/attend_backward_params.cuh"
#include "cuda/attend_chunk.cuh"
#include "cuda/attend_merge.cuh"

namespace resona::cuda {

struct AttendBackwardRowConfig {
  static constexpr int kThreads = 128;
  static constexpr int kPerLane = 8;  // elements of a row
  static constexpr int kUnroll = 4;   // partials in flight
  static constexpr int kSinkRows = 512;
  static constexpr int kRegisterCap = 128;
};

// ---- rows by groups of lanes

// Eight neighbouring elements of a row, those at `first`: zeros beyond `dim`.
struct RowPart {
  float at[AttendBackwardRowConfig::kPerLane];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : at) x = 0;
  }

  template <class T>
  __device__ __forceinline__ void load(const T* row, int first, int dim, bool vector) {
    clear();
    if (vector) {
      if (first < dim) set(0, load_four(row + first));
      if (first + 4 < dim) set(4, load_four(row + first + 4));
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + i < dim) at[i] = to_float(row[first + i]);
  }

  __device__ __forceinline__ void add(const RowPart& other) {
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] += other.at[i];
  }

  template <class T>
  __device__ __forceinline__ void store(T* row, int first, int dim, bool vector, float factor) const {
    if (vector) {
      if (first < dim) store_four(row + first, four(0, factor));
      if (first + 4 < dim) store_four(row + first + 4, four(4, factor));
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + i < dim) from_float(at[i] * factor, row[first + i]);
  }

 private:
  __device__ __forceinline__ float4 four(int i, float factor) const {
    return make_float4(at[i] * factor, at[i + 1] * factor, at[i + 2] * factor, at[i + 3] * factor);
  }
  __device__ __forceinline__ void set(int i, float4 x) {
    at[i] = x.x, at[i + 1] = x.y, at[i + 2] = x.z, at[i + 3] = x.w;
  }
};

// The lanes of a row: the fewest powers of two that hold it, at least 4.
__device__ __forceinline__ int lanes_of_row(int head_dim) {
  int lanes = 4;
  while (lanes * AttendBackwardRowConfig::kPerLane < head_dim) lanes *= 2;
  return lanes;
}

// Row `at` of `query`, of so many per query. Walking spares a division of 64 bits per row.
struct RowWalk {
  int64_t query, query_step;
  int at, at_step, of_query;

  __device__ __forceinline__ RowWalk(int64_t row, int64_t step, int rows_of_query) {
    of_query = rows_of_query;
    query = row / of_query, at = static_cast<int>(row - query * of_query);
    query_step = step / of_query, at_step = static_cast<int>(step - query_step * of_query);
  }
  __device__ __forceinline__ void next() {
    query += query_step, at += at_step;
    if (at >= of_query) at -= of_query, ++query;
  }
};

__device__ __forceinline__ int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// f(row, whether it exists, first element of the lane, lanes); lanes without a row take part in shuffles.
template <class F>
__device__ __forceinline__ void for_rows(int64_t queries, int rows_of_query, int head_dim, const F& f) {
  const int lanes = lanes_of_row(head_dim), first = threadIdx.x % lanes * AttendBackwardRowConfig::kPerLane;
  const int64_t rows = queries * rows_of_query, step = threads_of_grid() / lanes;
  RowWalk walk(thread_of_grid() / lanes, step, rows_of_query);
  for (int64_t of_warp = thread_of_grid() / kWarpSize * (kWarpSize / lanes); of_warp < rows;
       of_warp += step) {
    f(walk, walk.query < queries, first, lanes);
    walk.next();
  }
}

// Batch entry and token of a query. Divided in 32 bits: a call holds fewer than 2^31 slots.
struct QueryAt {
  uint32_t batch, token;
};

template <class T>
__device__ __forceinline__ QueryAt query_at(const AttendParams<T>& a, int64_t query) {
  const uint32_t queries = static_cast<uint32_t>(a.queries), batch = static_cast<uint32_t>(query) / queries;
  return {batch, static_cast<uint32_t>(query) - batch * queries};
}

template <class T>
__global__ void __launch_bounds__(AttendBackwardRowConfig::kThreads)
    attend_delta_kernel(AttendBackwardParams<T> p) {
  const AttendParams<T>& a = p.attend;
  ptx::griddepcontrol_wait();
  for_rows(a.batch * a.queries, a.heads, a.head_dim,
           [&](const RowWalk& at, bool exists, int first, int lanes) {
             float sum = 0;
             if (exists) {
               const QueryAt query = query_at(a, at.query);
               RowPart out, gradient;
               out.load(p.out.at(query.batch, query.token, at.at), first, a.head_dim, a.vector);
               gradient.load(p.out_gradient.at(query.batch, query.token, at.at), first, a.head_dim, a.vector);
#pragma unroll
               for (int i = 0; i < AttendBackwardRowConfig::kPerLane; ++i)
                 sum = __fmaf_rn(out.at[i], gradient.at[i], sum);
             }
             for (int distance = lanes / 2; distance > 0; distance /= 2)
               sum += __shfl_xor_sync(kAllLanes, sum, distance);
             const int64_t row = at.query * a.heads + at.at;
             if (exists && first == 0) p.delta[row] = sum - (p.lse_gradient ? p.lse_gradient[row] : 0);
           });
  ptx::griddepcontrol_launch_dependents();
}

// A (query, head) of this launch.
struct LaunchRow {
  int64_t query;
  int head, retrieval_head, kv, group_head;
};

template <class T>
__device__ __forceinline__ int rows_of_query(const AttendBackwardParams<T>& p) {
  return p.attend.retrieval_heads * p.heads * p.attend.group();
}

template <class T>
__device__ __forceinline__ LaunchRow launch_row(const AttendBackwardParams<T>& p, const RowWalk& walk) {
  const int group = p.attend.group(), of_list = p.heads * group, in_list = walk.at % of_list;
  LaunchRow r;
  r.query = walk.query, r.retrieval_head = walk.at / of_list;
  r.kv = in_list / group, r.group_head = in_list % group;
  r.head = (r.retrieval_head * p.heads_of_list() + p.first_head + r.kv) * group + r.group_head;
  return r;
}

// The partial row of slot j, or -1 if it adds nothing: unused, or dropped by its bias.
template <class T>
__device__ __forceinline__ int64_t partial_of_slot(const AttendBackwardParams<T>& p, const LaunchRow& r,
                                                   int64_t j) {
  const AttendParams<T>& a = p.attend;
  if (j >= a.top_k) return -1;
  const int64_t slot = (r.query * a.retrieval_heads + r.retrieval_head) * a.top_k + j;
  const int32_t position = p.position[slot];
  if (position < 0 || slot_bias(a, slot, r.retrieval_head) == -kInfinity) return -1;
  return p.partial_row(r.kv, position) + r.group_head;
}

template <class T>
__device__ __forceinline__ float sink_weight(const AttendParams<T>& a, int64_t head, float lse) {
  if (!a.sink || a.sink[head] == -kInfinity) return 0;
  return exp_of(a.sink[head] - lse);
}

template <class T>
__global__ void __launch_bounds__(AttendBackwardRowConfig::kThreads)
    attend_factor_kernel(AttendBackwardParams<T> p) {
  const AttendParams<T>& a = p.attend;
  ptx::griddepcontrol_wait();
  const int64_t queries = a.batch * a.queries;
  for (RowWalk walk(thread_of_grid(), threads_of_grid(), rows_of_query(p)); walk.query < queries;
       walk.next()) {
    const LaunchRow r = launch_row(p, walk);
    const int64_t row = r.query * a.heads + r.head;
    float total = 0;
    for (int64_t j = 0; j < a.top_k; ++j) {
      const int64_t partial = partial_of_slot(p, r, j);
      if (partial >= 0) total += p.row_sums[partial];
    }
    total += sink_weight(a, r.head, a.lse[row]);
    p.factor[row] = total == 0 ? 0 : 1 / total;
  }
  ptx::griddepcontrol_launch_dependents();
}

template <class T>
__global__ void __launch_bounds__(AttendBackwardRowConfig::kThreads)
    attend_query_gradient_kernel(AttendBackwardParams<T> p) {
  constexpr int kUnroll = AttendBackwardRowConfig::kUnroll;
  const AttendParams<T>& a = p.attend;
  const int pitch = partial_pitch(a.head_dim);
  ptx::griddepcontrol_wait();
  const auto sum_row = [&](const RowWalk& walk, bool exists, int first, int) {
    if (!exists) return;
    const LaunchRow r = launch_row(p, walk);
    const bool used = a.lse[r.query * a.heads + r.head] != -kInfinity;
    if (!p.query_partial && used && partial_of_slot(p, r, 0) >= 0) return;  // attend_backward_kernel has
    RowPart sum;
    sum.clear();
    for (int64_t j = 0; p.query_partial && used && j < a.top_k; j += kUnroll) {
      RowPart parts[kUnroll];
      int64_t partial[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        partial[u] = partial_of_slot(p, r, j + u);
        if (partial[u] >= 0) parts[u].load(p.query_partial + partial[u] * pitch, first, pitch, true);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (partial[u] >= 0) sum.add(parts[u]);
    }
    const QueryAt query = query_at(a, r.query);
    sum.store(p.query_gradient.at(query.batch, query.token, r.head), first, a.head_dim, a.vector, a.scale);
  };
  for_rows(a.batch * a.queries, rows_of_query(p), a.head_dim, sum_row);
  ptx::griddepcontrol_launch_dependents();
}

// Launches take the heads of a slot in their order.
template <class T>
__global__ void __launch_bounds__(AttendBackwardRowConfig::kThreads)
    attend_bias_gradient_kernel(AttendBackwardParams<T> p) {
  const AttendParams<T>& a = p.attend;
  const int64_t group = a.group();
  ptx::griddepcontrol_wait();
  for (int64_t slot = thread_of_grid(); slot < p.slots; slot += threads_of_grid()) {
    const int64_t retrieval_head = slot / a.top_k % a.retrieval_heads;
    const int32_t position = p.position[slot];
    const bool used = position >= 0 && slot_bias(a, slot, retrieval_head) != -kInfinity;
    float sum = p.first_head == 0 ? 0 : p.bias_gradient[slot];
    for (int64_t kv = 0; used && kv < p.heads; ++kv)
      for (int64_t g = 0; g < group; ++g) sum += p.row_sums[p.partial_row(kv, position) + g];
    p.bias_gradient[slot] = sum;
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- the sink

template <class T>
struct AttendSinkParams {
  AttendParams<T> attend;
  const float* delta;   // [B, T, H]
  const float* factor;  // [B, T, H], null: 1
  float* sums;          // [B, tiles of T, H]
  int64_t tiles;        // of a batch entry

  __device__ __forceinline__ int64_t rows_of_sums() const { return attend.batch * tiles; }
};

template <class T>
__global__ void __launch_bounds__(AttendBackwardRowConfig::kThreads)
    attend_sink_rows_kernel(AttendSinkParams<T> p) {
  constexpr int kRows = AttendBackwardRowConfig::kSinkRows;
  const AttendParams<T>& a = p.attend;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t items = p.rows_of_sums() * a.heads;
  ptx::griddepcontrol_wait();
  for (int64_t item = thread_of_grid() / kWarpSize; item < items; item += threads_of_grid() / kWarpSize) {
    const int64_t head = item % a.heads, tile = item / a.heads;
    const int64_t batch = tile / p.tiles, begin = tile % p.tiles * kRows;
    const int64_t end = begin + kRows < a.queries ? begin + kRows : a.queries;
    float sum = 0;
    for (int64_t token = begin + lane; token < end; token += kWarpSize) {
      const int64_t row = (batch * a.queries + token) * a.heads + head;
      const float weight = sink_weight(a, head, a.lse[row]);
      if (weight != 0) sum -= weight * (p.factor ? p.factor[row] : 1) * p.delta[row];
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane == 0) p.sums[tile * a.heads + head] = sum;
  }
  ptx::griddepcontrol_launch_dependents();
}

struct AttendSinkSumParams {
  const float* sums;     // [rows, H]
  float* sink_gradient;  // [H]
  int64_t rows;
  int heads;
};

static __global__ void __launch_bounds__(AttendBackwardRowConfig::kThreads)
    attend_sink_gradient_kernel(AttendSinkSumParams p) {
  ptx::griddepcontrol_wait();
  for (int64_t head = thread_of_grid(); head < p.heads; head += threads_of_grid()) {
    double sum = 0;
    for (int64_t row = 0; row < p.rows; ++row) sum += p.sums[row * p.heads + head];
    p.sink_gradient[head] = static_cast<float>(sum);
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
