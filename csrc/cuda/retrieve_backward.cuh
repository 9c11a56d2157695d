// Gradients of the scores of the retrieved chunks; the indices are constants. With s = <q, c> / |q| and g the
// gradient of s,
//
//   d q = (v - <v, q> / |q|^2 q) / |q|,  v = sum g c      d c = sum g / |q| q      zero where |q| = 0
//
//   retrieve_query_gradient_kernel     a group of lanes owns a query row: v over its slots, in order; writes
//                                      d q, and g / |q| of every slot for the kernels below
//   the inverted index (index.cuh), one row per query, tile_rows = retrieve_segment(T)
//   retrieve_chunk_segments_kernel     a warp takes a segment of a chunk's list: sum of factor * q. The only
//                                      segment of a list is d c; of several, each leaves a partial sum
//   retrieve_chunk_gradient_kernel     a group of lanes owns a chunk: its partial sums in order; zeros for
//                                      chunks in no list
//
// Bytes: the query kernel gathers k chunks per row, the segments kernel one query row per slot, both mostly
// from L2; partial sums add 8 E per segment, 1/16 of the 16-bit gather at 64 slots per segment and less
// above. Segments end at fixed places of the lists, every sum has a fixed order and every element one writer:
// the result is the same bit for bit on every run and any grid. Segments grow with sqrt(T), so the chunk that
// every query selects costs two chains of about sqrt(T) rows, not one of T.
//
// The size of the groups and 16-byte access are chosen at run time: they cost a few integer operations per
// row.
#pragma once

#include <cmath>

#include "common/macros.h"
#include "cuda/device.cuh"
#include "cuda/index.cuh"
#include "cuda/lane_part.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/sequences.cuh"

namespace resona::cuda {

struct RetrieveBackwardConfig {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kPerLane = kLaneElements;  // of a row
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks = 65536 / (kThreads * kRegisterCap);
};

template <class T>
struct RetrieveBackwardParams {
  const T* query;  // [B, T, R, E], last dimension contiguous
  int64_t query_batch_stride, query_token_stride, query_head_stride;
  const T* chunks;  // [B, C, R, E], last dimension contiguous
  int64_t chunk_batch_stride, chunk_row_stride, chunk_head_stride;
  const int32_t* indices;                // [B, T, R, k]
  const float* score_gradient;           // [B, T, R, k]
  T* query_gradient;                     // [B, T, R, E], contiguous
  T* chunk_gradient;                     // [B, C, R, E], contiguous
  int64_t batch, queries, heads, top_k;  // B, T, R, k
  int64_t context, chunk_size, dim;      // L, S, E
  int64_t chunks_per_batch;              // C = L / S
  PackedSequences packed;                // B == 1 if there are any
  int lanes;                             // of a group: 1, 2, 4 ... 32; 8 elements each, longer rows in slices
  bool vector;                           // all rows lie on 16-byte borders and are multiples of 16 bytes long
  float* factors;                        // [B, T, R, k] workspace: g / |q|
  float* partials;                       // [retrieve_partials(B T R k, segment), E rounded up to 8] workspace

  // By index.cuh, with rows_per_query = 1 and tile_rows = segment:
  const uint32_t* slots;        // sorted by key = (b R + r) C + chunk
  const uint32_t* offsets;      // [B R C + 1]: where the list of a key begins
  const uint32_t* tile_begin;   // [B R C + 1]: scanned numbers of segments
  const uint32_t* tile_totals;  // of that scan
  int64_t segment;              // slots

  __device__ __forceinline__ int64_t rows() const { return batch * queries * heads; }
  __device__ __forceinline__ int64_t keys() const { return batch * heads * chunks_per_batch; }
  __device__ __forceinline__ int slice() const { return lanes * RetrieveBackwardConfig::kPerLane; }
  __device__ __forceinline__ int64_t slices() const { return (dim + slice() - 1) / slice(); }
  __device__ __forceinline__ int width(int64_t first) const {  // of the slice that begins there
    return dim - first < slice() ? static_cast<int>(dim - first) : slice();
  }
};

// The smallest power of two, at least 64, whose square reaches the longest list: one slot of each query.
RESONA_HD int64_t retrieve_segment(int64_t queries) {
  int64_t segment = 64;
  while (segment * segment < queries) segment *= 2;
  return segment;
}

// Rows of partial sums. A segment that begins at position p of the lists has row 2 (p / segment), plus one if
// it is the first of its list. Only lists of several segments have any, so all but the last segment of a list
// are full, and no two of them share a row.
RESONA_HD int64_t retrieve_partials(int64_t slots, int64_t segment) {
  return 2 * ((slots + segment - 1) / segment);
}

RESONA_HD int64_t partial_row(int64_t list_begin, int64_t segment_of_list, int64_t segment) {
  return 2 * (list_begin / segment + segment_of_list) + (segment_of_list == 0);
}

// sum += factor * row over `count` rows: find(i, factor) gives a row's address, or null for none. All lanes
// of the warp call it, with the same `i`.
template <class T, class Find>
__device__ __forceinline__ void add_rows(const RetrieveBackwardParams<T>& p, int64_t count, int width,
                                         float (&sum)[RetrieveBackwardConfig::kPerLane], const Find& find) {
  constexpr int kUnroll = LanePart<T>::kUnroll;
  for (int64_t i = 0; i < count; i += kUnroll) {
    LanePart<T> parts[kUnroll];
    float factors[kUnroll];
    bool found[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const T* row = i + u < count ? find(i + u, factors[u]) : nullptr;
      found[u] = row != nullptr;
      if (found[u]) parts[u].load(row, p.lanes, width, p.vector);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!found[u]) continue;
#pragma unroll
      for (int j = 0; j < RetrieveBackwardConfig::kPerLane; ++j)
        sum[j] = std::fma(factors[u], parts[u].at(j), sum[j]);
    }
  }
}

// ---- gradient of the queries

template <class T>
struct QueryRow {
  const T* query;      // null beyond the last row
  const T* chunks;     // chunk 0 of its sequence
  int64_t first_slot;  // of the row
  int64_t eligible;    // an index at or above is unused

  __device__ __forceinline__ bool uses(int32_t index) const { return index >= 0 && index < eligible; }
};

template <class T>
__device__ __forceinline__ QueryRow<T> query_row(const RetrieveBackwardParams<T>& p, int64_t row) {
  if (row >= p.rows()) return {nullptr, nullptr, 0, 0};
  // Divisions of 32 bits: a call holds fewer than 2^31 slots.
  const uint32_t heads = static_cast<uint32_t>(p.heads), queries = static_cast<uint32_t>(p.queries);
  const uint32_t head = static_cast<uint32_t>(row) % heads, at = static_cast<uint32_t>(row) / heads;
  const uint32_t batch = at / queries, token = at % queries;
  const QueryPlace place =
      place_of_query(p.packed, token, p.queries, p.context, p.chunk_size, p.chunks_per_batch);
  return {p.query + batch * p.query_batch_stride + token * p.query_token_stride + head * p.query_head_stride,
          p.chunks + batch * p.chunk_batch_stride + place.chunk_begin * p.chunk_row_stride +
              head * p.chunk_head_stride,
          row * p.top_k, place.eligible};
}

// v of one slice.
template <class T>
__device__ __forceinline__ void sum_chunks(const RetrieveBackwardParams<T>& p, const QueryRow<T>& row,
                                           int64_t slice, float (&sum)[RetrieveBackwardConfig::kPerLane]) {
#pragma unroll
  for (float& x : sum) x = 0;
  add_rows(p, p.top_k, p.width(slice), sum, [&](int64_t slot, float& factor) -> const T* {
    const int32_t index = row.query ? p.indices[row.first_slot + slot] : -1;
    if (!row.uses(index)) return nullptr;
    factor = p.score_gradient[row.first_slot + slot];
    return row.chunks + index * p.chunk_row_stride + slice;
  });
}

// g / |q| of each slot of the row, by the lanes that own it. Returns whether it has a used slot.
template <class T>
__device__ __forceinline__ bool write_factors(const RetrieveBackwardParams<T>& p, const QueryRow<T>& row,
                                              double norm) {
  int used = 0;
  for (int64_t slot = threadIdx.x % p.lanes; row.query && slot < p.top_k; slot += p.lanes) {
    const int64_t at = row.first_slot + slot;
    const bool counts = row.uses(p.indices[at]);
    p.factors[at] = counts && norm != 0 ? static_cast<float>(p.score_gradient[at] / norm) : 0.f;
    used += counts;
  }
  return sum_lanes(used, p.lanes) != 0;
}

template <class T>
__global__ void __launch_bounds__(RetrieveBackwardConfig::kThreads, RetrieveBackwardConfig::kMinBlocks)
    retrieve_query_gradient_kernel(RetrieveBackwardParams<T> p) {
  constexpr int kPerLane = RetrieveBackwardConfig::kPerLane;
  const int groups = kWarpSize / p.lanes, group = threadIdx.x % kWarpSize / p.lanes;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * RetrieveBackwardConfig::kWarps * groups;
  ptx::griddepcontrol_wait();
  for (int64_t first = warp * groups; first < p.rows(); first += step) {
    const QueryRow<T> row = query_row(p, first + group);
    LanePart<T> query;
    float v[kPerLane];
    const auto load = [&](int64_t slice) {
      if (row.query) query.load(row.query + slice, p.lanes, p.width(slice), p.vector);
      sum_chunks(p, row, slice, v);
    };
    double squares = 0, along = 0;  // |q|^2, <v, q>
    for (int64_t slice = 0; slice < p.dim; slice += p.slice()) {
      load(slice);
#pragma unroll
      for (int j = 0; row.query && j < kPerLane; ++j) {
        const double x = query.at(j);
        squares += x * x;
        along += x * v[j];
      }
    }
    const double norm = std::sqrt(sum_lanes(squares, p.lanes));
    const bool used = write_factors(p, row, norm);
    along = sum_lanes(along, p.lanes) / norm / norm;
    const double inverse = 1 / norm;
    for (int64_t slice = 0; slice < p.dim; slice += p.slice()) {
      if (p.dim > p.slice()) load(slice);
      if (!row.query) continue;
      LanePart<T> gradient;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        gradient.set(j, used && norm != 0 ? static_cast<float>((v[j] - along * query.at(j)) * inverse) : 0.f);
      gradient.store(p.query_gradient + (first + group) * p.dim + slice, p.lanes, p.width(slice), p.vector);
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- gradient of the chunks

// The row of the chunk tensors that a key stands for.
struct ChunkOfKey {
  int64_t batch, head, chunk;
};

template <class T>
__device__ __forceinline__ ChunkOfKey chunk_of_key(const RetrieveBackwardParams<T>& p, int64_t key) {
  // Divisions of 32 bits: so are keys.
  const uint32_t at = static_cast<uint32_t>(key), chunks = static_cast<uint32_t>(p.chunks_per_batch);
  const uint32_t heads = static_cast<uint32_t>(p.heads);
  return {at / chunks / heads, at / chunks % heads, at % chunks};
}

template <class T>
__device__ __forceinline__ void write_chunk(const RetrieveBackwardParams<T>& p, const ChunkOfKey& at,
                                            int64_t slice,
                                            const float (&sum)[RetrieveBackwardConfig::kPerLane]) {
  const int64_t row = (static_cast<int64_t>(at.batch) * p.chunks_per_batch + at.chunk) * p.heads + at.head;
  LanePart<T> gradient;
#pragma unroll
  for (int j = 0; j < RetrieveBackwardConfig::kPerLane; ++j) gradient.set(j, sum[j]);
  gradient.store(p.chunk_gradient + row * p.dim + slice, p.lanes, p.width(slice), p.vector);
}

// f(where four of a lane's elements lie, the first of them) for a slice of a row of partial sums.
template <class T, class F>
__device__ __forceinline__ void for_partials(const RetrieveBackwardParams<T>& p, int64_t row, int64_t slice,
                                             const F& f) {
  constexpr int kPack = LanePart<T>::kPack;
  float* sums = p.partials + row * ((p.dim + 7) / 8 * 8) + slice;
#pragma unroll
  for (int j = 0; j < RetrieveBackwardConfig::kPerLane; j += 4) {
    const int e = LanePart<T>::first_element(j / kPack, p.lanes);
    if (e < p.width(slice)) f(sums + e + j % kPack, j);
  }
}

// Sums the segment's rows: lane i knows slot i of 32, the groups of lanes take them in turn.
template <class T>
__device__ __forceinline__ void sum_queries(const RetrieveBackwardParams<T>& p, const ChunkOfKey& at,
                                            int64_t begin, int64_t end, int64_t slice,
                                            float (&sum)[RetrieveBackwardConfig::kPerLane]) {
  const int lane = threadIdx.x % kWarpSize, groups = kWarpSize / p.lanes, group = lane / p.lanes;
  const uint32_t slots_per_query = static_cast<uint32_t>(p.heads * p.top_k);
  const uint32_t first_query = static_cast<uint32_t>(at.batch * p.queries);
  const T* queries = p.query + at.batch * p.query_batch_stride + at.head * p.query_head_stride + slice;
#pragma unroll
  for (float& x : sum) x = 0;
  for (int64_t position = begin; position < end; position += kWarpSize) {
    uint32_t own_query = 0;
    float own_factor = 0;
    if (position + lane < end) {
      const uint32_t slot = p.slots[position + lane];
      own_query = slot / slots_per_query - first_query;
      own_factor = p.factors[slot];
    }
    const int64_t left = end - position, most = left < kWarpSize ? left : kWarpSize;
    add_rows(p, (most + groups - 1) / groups, p.width(slice), sum, [&](int64_t i, float& factor) -> const T* {
      const int from = static_cast<int>(i) * groups + group;
      factor = __shfl_sync(kAllLanes, own_factor, from);
      const uint32_t query = __shfl_sync(kAllLanes, own_query, from);
      return from < most ? queries + query * p.query_token_stride : nullptr;
    });
  }
#pragma unroll
  for (float& x : sum)
    for (int distance = p.lanes; distance < kWarpSize; distance *= 2)
      x += __shfl_xor_sync(kAllLanes, x, distance);
}

template <class T>
__global__ void __launch_bounds__(RetrieveBackwardConfig::kThreads, RetrieveBackwardConfig::kMinBlocks)
    retrieve_chunk_segments_kernel(RetrieveBackwardParams<T> p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * RetrieveBackwardConfig::kWarps;
  ptx::griddepcontrol_wait();
  const int64_t items = work_items(p.tile_begin, p.tile_totals, p.keys()) * p.slices();
  for (int64_t item = warp; item < items; item += warps) {
    const uint32_t tile = static_cast<uint32_t>(item / p.slices());
    const int64_t slice = item % p.slices() * p.slice();
    const WorkItem work = find_work(p.tile_begin, p.tile_totals, p.keys(), tile);
    const ChunkOfKey at = chunk_of_key(p, work.key);
    const int64_t list_begin = p.offsets[work.key], list_end = p.offsets[work.key + 1];
    const int64_t begin = list_begin + (tile - work.begin) * p.segment;
    const int64_t end = list_end - begin < p.segment ? list_end : begin + p.segment;
    float sum[RetrieveBackwardConfig::kPerLane];
    sum_queries(p, at, begin, end, slice, sum);
    if (lane >= p.lanes) continue;
    if (list_end - list_begin <= p.segment)
      write_chunk(p, at, slice, sum);
    else
      for_partials(p, partial_row(list_begin, tile - work.begin, p.segment), slice, [&](float* to, int j) {
        Pack<float, true> pack{};
#pragma unroll
        for (int i = 0; i < 4; ++i) pack.at[i] = sum[j + i];
        pack.store(to);
      });
  }
  ptx::griddepcontrol_launch_dependents();
}

template <class T>
__global__ void __launch_bounds__(RetrieveBackwardConfig::kThreads, RetrieveBackwardConfig::kMinBlocks)
    retrieve_chunk_gradient_kernel(RetrieveBackwardParams<T> p) {
  constexpr int kUnroll = 4, kPerLane = RetrieveBackwardConfig::kPerLane;
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / p.lanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * RetrieveBackwardConfig::kThreads / p.lanes;
  const int64_t items = p.keys() * p.slices();
  ptx::griddepcontrol_wait();
  for (int64_t item = group; item < items; item += groups) {
    const int64_t key = item / p.slices(), slice = item % p.slices() * p.slice();
    const int64_t begin = p.offsets[key], length = p.offsets[key + 1] - begin;
    const int64_t segments = (length + p.segment - 1) / p.segment;
    if (segments == 1) continue;  // written by its segment
    float sum[kPerLane] = {};
    for (int64_t i = 0; i < segments; i += kUnroll) {
      Pack<float, true> packs[kUnroll][kPerLane / 4] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (i + u < segments)
          for_partials(p, partial_row(begin, i + u, p.segment), slice,
                       [&](const float* from, int j) { packs[u][j / 4].load(from); });
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int j = 0; i + u < segments && j < kPerLane; ++j) sum[j] += packs[u][j / 4].at[j % 4];
    }
    write_chunk(p, chunk_of_key(p, key), slice, sum);
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
