// The inner loops, one table per accumulation type. Every table is compiled once per instruction set from
// the same source (micro/*.h) and chosen at run time; the stages around them are ordinary C++.
// A is float for float32, float16 and bfloat16 inputs, double for float64 inputs.
#pragma once

#include <cstdint>

#include "common/problem.h"
#include "cpu/tile_kernels.h"

namespace resona::cpu {

// c[m, n] = a[m, depth] * b[depth, n], added to c if `accumulate`. Every element is summed in the same
// order whatever m and n, so a row's result does not depend on the rows beside it. n is a multiple of 16.
template <class A>
struct Gemm {
  int64_t m, n, depth;
  const A* a;
  int64_t a_row_stride, a_depth_stride;
  const A* b;
  int64_t b_stride;
  A* c;
  int64_t c_stride;
  bool accumulate;
};

// A tile of dot products <query, key> meets the running softmax of its rows. On return `tile` holds the
// weights relative to the new peak. Tile row i belongs to accumulator row rows[i].
template <class A>
struct SoftmaxTile {
  int64_t row_count, columns, stride;
  A* tile;
  A scale;
  const A* bias;        // [row_count]
  const int32_t* rows;  // [row_count]
  A* peak;              // running maximum, by accumulator row
  A* total;             // running sum of weights, by accumulator row
  A* decay;             // [row_count] out: factor for what was accumulated before
};

// Recomputes the weights of a tile as exp(logit - lse) * factor and turns d(weight) into d(logit). The logit
// is rounded as in the forward pass, so the exponent is never positive.
template <class A>
struct SoftmaxBackwardTile {
  int64_t row_count, columns, stride;
  A* tile;      // in: <query, key>; out: weight
  A* gradient;  // in: <d out, value>; out: d logit
  A scale;
  const A* bias;    // [row_count]
  const A* lse;     // [row_count]
  const A* factor;  // [row_count]
  const A* delta;   // [row_count] <d out, out> - d lse
  A* weight_sum;    // [row_count] out: sum of the weights over the columns
  A* gradient_sum;  // [row_count] out: sum of d logit over the columns
};

// Quick products of one query with chunks first_chunk, first_chunk + 1, ... in the search. Those not below
// the threshold, which is the worst of the best less a margin, are kept.
struct FilterRow {
  static constexpr int64_t kLanes = 16;  // room for so many more at the end of what is written
  const float* products;
  int64_t count;
  int32_t first_chunk;
  float margin;    // inf or NaN: everything is kept
  bool is_ranked;  // the products are among those that the best were taken from
  int64_t slots;
  float* best;  // [slots, at least kLanes] best first; -inf where there is none yet
  float* kept_products;
  int32_t* kept_chunks;
  int64_t kept;  // so far
};

// One query row meets the chunks that it selected. Rows of keys and values are those of one head, from token
// 0 of the sequence on, `key_stride` and `value_stride` bytes apart; any alignment.
template <class A>
struct RowAttend {
  struct Chunk {
    int64_t token;  // its first
    A bias;
  };
  const Chunk* chunks;  // [chunk_count]
  int64_t chunk_count, chunk_size, dim;
  const A* query;  // [dim]
  const char *key, *value;
  int64_t key_stride, value_stride;
  A scale;
  A* weight;        // [chunk_count * chunk_size, and a vector more] scratch
  A* sum;           // [dim] out: weights times values
  A *peak, *total;  // out: the highest logit, the sum of the weights relative to it
};

template <class A>
struct Kernels {
  void (*gemm)(const Gemm<A>&);
  void (*softmax)(const SoftmaxTile<A>&);
  void (*softmax_backward)(const SoftmaxBackwardTile<A>&);
  void (*add_scaled)(A factor, const A* x, A* y, int64_t n);    // y += factor * x
  void (*decay_and_add)(A decay, const A* x, A* y, int64_t n);  // y = decay * y + x
  int64_t (*filter)(const FilterRow&);                          // how many are kept by now; null for double
  // Keeps what is not below `bar`, in place; returns how many.
  int64_t (*drop_below)(float bar, float* products, int32_t* chunks, int64_t count);
  double (*canonical_dot)(const A* a, const A* b, int64_t n);
  void (*canonical_dots)(const A* a, const A* rows, int64_t count, int64_t n,
                         double* dots);  // rows [count, n]
  // to[column, row] = from[row, column]; rows up to a multiple of 16 become zero columns of `to`.
  void (*transpose)(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to);
  // sum[n] of `count` rows, `stride` bytes apart, in ascending order from zero on; by DType as below.
  void (*sum_rows[4])(const char* from, int64_t stride, int64_t count, int64_t n, A* sum);
  void (*attend_row[4])(const RowAttend<A>&);           // by DType of keys and values; null if not for A
  void (*load[4])(const void* from, A* to, int64_t n);  // by DType; null if not for A
  void (*store[4])(const A* from, void* to, int64_t n);

  void load_row(DType type, const void* from, A* to, int64_t n) const {
    load[static_cast<int>(type)](from, to, n);
  }
  void store_row(DType type, const A* from, void* to, int64_t n) const {
    store[static_cast<int>(type)](from, to, n);
  }
};

struct KernelSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  const TileKernels* tiles;  // null where the processor has none
};

// The widest set this processor runs, or the one named by RESONA_CPU_ISA (amx, avx512_bf16, avx512, avx2,
// portable).
const KernelSet& kernel_set();

template <class A>
const Kernels<A>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return kernel_set().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return kernel_set().f64;
}

extern const KernelSet portable_kernels;
#if defined(RESONA_HAS_X86_KERNELS)
extern const KernelSet avx2_kernels;
extern const KernelSet avx512_kernels;
#endif

}  // namespace resona::cpu
