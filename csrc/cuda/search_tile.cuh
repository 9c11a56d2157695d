// The products of 128 queries with 64 chunks after 64, as a stream: a ring of shared-memory stages filled by
// cp.async, multiplied by mma.sync into a warp's 16 x 64 accumulators.
//
// A stage holds a slice of 64 chunk rows and, unless queries are pinned in registers, the same slice of the
// 128 query rows. 16-byte units are permuted within a row (unit ^ row mod 8), so that the eight rows of an
// ldmatrix, or of a fragment of float32, fall into different banks. Rows and elements that do not exist are
// zeros: they change no product. Rows off 16-byte borders are copied element by element.
#pragma once

#include "cuda/device.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/types.cuh"

namespace resona::cuda {

constexpr int kSearchThreads = 256;
constexpr int kSearchChunks = 64;  // columns of a step
constexpr int kWarpRows = 16;      // queries of a warp
constexpr int kSearchRows = kSearchThreads / kWarpSize * kWarpRows;

// Rows [batch, row, head, dim] with a contiguous last dimension; strides in elements.
template <class T>
struct SearchOperand {
  const T* data;
  int64_t batch_stride, row_stride, head_stride;
  bool vector;  // rows begin on 16-byte borders

  __device__ __forceinline__ const T* at(int64_t batch, int64_t row, int64_t head) const {
    return data + batch * batch_stride + row * row_stride + head * head_stride;
  }
};

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  ptx::mma_m16n8k16_f16(c, a, b);
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  ptx::mma_m16n8k16_bf16(c, a, b);
}

// x = high + low to 22 bits, both TF32.
__device__ __forceinline__ void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = ptx::cvt_rna_tf32_f32(x);
  low = ptx::cvt_rna_tf32_f32(x - __uint_as_float(high));
}

template <class T, bool kPinned>
class SearchTile {
 public:
  static constexpr int kColumns = kSearchChunks / 8;
  static constexpr int kRowBytes = kPinned ? 256 : 128;
  static constexpr int kStageBytes = (kSearchChunks + (kPinned ? 0 : kSearchRows)) * kRowBytes;

  // The stream of chunk rows [first, end) against queries [0, count) behind `query`.
  __device__ __forceinline__ SearchTile(const T* query, int64_t query_stride, bool query_vector, int count,
                                        const T* chunk, int64_t chunk_stride, bool chunk_vector, int first,
                                        int end, int dim, unsigned char* shared)
      : query_(query),
        chunk_(chunk + first * chunk_stride),
        query_stride_(query_stride),
        chunk_stride_(chunk_stride),
        queries_(count),
        left_(end - first),
        dim_(dim),
        query_vector_(query_vector),
        chunk_vector_(chunk_vector),
        shared_(shared) {}

  // Call once, then next() for each 64 chunks of the range.
  template <int kStages>
  __device__ __forceinline__ void start() {
    if constexpr (kPinned) {
      static_assert(kStages * kStageBytes >= kSearchRows * kRowBytes, "the queries pass through the stages");
      copy_rows(query_, query_stride_, query_vector_, kSearchRows, queries_, 0, shared_);
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_all();
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_query_fragment(pinned_[k], shared_, k);
      __syncthreads();  // the first chunks take the place of the queries
    }
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) prefetch(shared_ + i * kStageBytes);
  }

  // A warp that does not want the products has the barriers and copies only.
  template <int kStages>
  __device__ __forceinline__ void next(float (&acc)[kColumns][4], bool wanted) {
    for (int slice = 0; slice < (kPinned ? 1 : dim_); slice += kSlice) {
      ptx::cp_async_wait_group<kStages - 2>();
      __syncthreads();  // the stage has landed for all, and all are done with the one before it
      const unsigned char* stage = shared_ + full_ * kStageBytes;
      prefetch(shared_ + (full_ == 0 ? kStages - 1 : full_ - 1) * kStageBytes);
      full_ = full_ + 1 == kStages ? 0 : full_ + 1;
      if (wanted) multiply(acc, stage, dim_ - slice);
    }
  }

 private:
  static constexpr int kSlice = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  static constexpr int kUnits = kRowBytes / 16;
  static constexpr int kStepElements = sizeof(T) == 2 ? 16 : 8;  // of an mma
  static constexpr int kSteps = kSlice / kStepElements;

  const T* query_;
  const T* chunk_;  // the row to be fetched next
  int64_t query_stride_, chunk_stride_;
  int queries_, left_, dim_;  // left_: chunk rows from chunk_ on
  bool query_vector_, chunk_vector_;
  unsigned char* shared_;
  int full_ = 0;   // stage to be read next; the one before it is the next to be filled
  int slice_ = 0;  // to be fetched next
  uint32_t pinned_[kPinned ? kSteps : 1][4];

  // Rows are multiples of 128 bytes, so offset(row, 2 k + u) == offset(row, u) ^ 32 k.
  static __device__ __forceinline__ int offset(int row, int unit) {
    return row * kRowBytes + ((unit ^ (row & 7)) * 16);
  }

  __device__ __forceinline__ void prefetch(unsigned char* stage) {
    if (left_ > 0) {
      copy_rows(chunk_, chunk_stride_, chunk_vector_, kSearchChunks, left_, slice_, stage);
      if constexpr (!kPinned)
        copy_rows(query_, query_stride_, query_vector_, kSearchRows, queries_, slice_,
                  stage + kSearchChunks * kRowBytes);
    }
    slice_ += kSlice;
    if (kPinned || slice_ >= dim_)
      slice_ = 0, left_ -= kSearchChunks, chunk_ += kSearchChunks * chunk_stride_;
    ptx::cp_async_commit_group();  // empty at the end, so that waiting keeps its count
  }

  // Elements [slice, slice + kSlice) of `rows` rows, of which `exist` do. A thread keeps to its unit.
  __device__ __forceinline__ void copy_rows(const T* from, int64_t stride, bool vector, int rows, int exist,
                                            int slice, unsigned char* to) const {
    constexpr int kStep = kSearchThreads / kUnits;
    static_assert(kStep % 8 == 0, "the permutation is the same in all rows of a thread");
    int row = threadIdx.x / kUnits;
    const int unit = threadIdx.x % kUnits, element = slice + unit * kUnit;
    const int left = element < dim_ ? dim_ - element : 0, count = left < kUnit ? left : kUnit;
    const T* source = from + row * stride + element;
    unsigned char* target = to + offset(row, unit);
#pragma unroll 1
    for (; row < rows; row += kStep, source += kStep * stride, target += kStep * kRowBytes) {
      const int here = row < exist ? count : 0;
      if (vector) {
        ptx::cp_async_cg_16(target, here > 0 ? source : from, here * static_cast<int>(sizeof(T)));
      } else {
        for (int e = 0; e < kUnit; ++e) reinterpret_cast<T*>(target)[e] = e < here ? source[e] : T();
      }
    }
  }

  __device__ __forceinline__ void load_query_fragment(uint32_t (&a)[4], const unsigned char* rows,
                                                      int k) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    ptx::ldmatrix_x4(a, rows + (offset(warp * kWarpRows + lane % 16, lane / 16) ^ (32 * k)));
  }

  // `left`: elements from this slice on.
  __device__ __forceinline__ void multiply(float (&acc)[kColumns][4], const unsigned char* stage,
                                           int left) const {
#pragma unroll(sizeof(T) == 2 ? kSteps : 1)  // float32 has no registers for the addresses of all steps
    for (int k = 0; k < kSteps; ++k) {
      if (k * kStepElements >= left) break;
      if constexpr (sizeof(T) == 2)
        multiply_16(acc, stage, k);
      else
        multiply_32(acc, stage, k);
    }
  }

  __device__ __forceinline__ void multiply_16(float (&acc)[kColumns][4], const unsigned char* stage,
                                              int k) const {
    if constexpr (kPinned) {
      multiply_columns(acc, pinned_[k], stage, k);
    } else {
      uint32_t a[4];
      load_query_fragment(a, stage + kSearchChunks * kRowBytes, k);
      multiply_columns(acc, a, stage, k);
    }
  }

  __device__ __forceinline__ void multiply_columns(float (&acc)[kColumns][4], const uint32_t (&a)[4],
                                                   const unsigned char* chunks, int k) const {
    const int lane = threadIdx.x % kWarpSize;
    const int at = offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ (32 * k);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, chunks + n * 8 * kRowBytes + at);
      const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
      mma(acc[n], a, even, T());
      mma(acc[n + 1], a, odd, T());
    }
  }

  // 3xTF32, small products first.
  __device__ __forceinline__ void multiply_32(float (&acc)[kColumns][4], const unsigned char* stage,
                                              int k) const {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    const int row = threadIdx.x / kWarpSize * kWarpRows + g;
    const auto element = [&](const unsigned char* rows, int at_row, int half) {
      return reinterpret_cast<const float*>(rows + offset(at_row, 2 * k + half))[t];
    };
    const unsigned char* queries = stage + kSearchChunks * kRowBytes;
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(element(queries, row + i % 2 * 8, i / 2), high[i], low[i]);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      uint32_t chunk_high[2], chunk_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) split_tf32(element(stage, n * 8 + g, i), chunk_high[i], chunk_low[i]);
      ptx::mma_m16n8k8_tf32(acc[n], low, chunk_high);
      ptx::mma_m16n8k8_tf32(acc[n], high, chunk_low);
      ptx::mma_m16n8k8_tf32(acc[n], high, chunk_high);
    }
  }
};

}  // namespace resona::cuda
