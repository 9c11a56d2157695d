// How far a quickly computed product <q, c> may lie from the exact one, and what follows from it: which
// chunks can still enter a row's top k. Searches on every device use any arithmetic they like to pass over
// chunks, as long as they obey these bounds; what they keep is scored canonically.
//
//   |quick - exact| <= relative |q| |c| + absolute
//
// With A = sum |q_e c_e| <= |q| |c|, n elements and u = 2^-24:
//   fp32      n products summed in any order, fused or not: n u / (1 - n u) A.
//   mma 16    products of 16-bit floats are exact. A tensor core adds groups of at least 4 products to the
//             accumulator; it aligns the terms to the largest, cuts off below 24 bits, and cuts the sum to
//             fp32: at most 6 errors of 2 u A for 4 products, 3 n u A in all. Taken as 4 n u.
//   3xTF32    x = high + low + rest with |rest| <= 2^-22 |x| and |low| <= 2^-11 |x|: the products left out
//             are below 12 u A. Three sums of n products, as above: 9 n u A and a little. Taken as 10 n u.
//   bf16 tile (AMX, and VDPBF16PS on vectors) fused multiply-adds and sums in fp32, each rounded to nearest
//             (Intel SDM, TDPBF16PS; AMD's may round less often): as fp32.
//             Factors that are not bfloat16 are rounded to it, by 2^-9 each: (1 + 2^-9)^2 - 1 < 0x1.01p-8
//             more. Denormal factors and results count as zero, which is `absolute`.
// `absolute` covers products that underflow, for factors in the range of in_filter_range.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace resona {

struct FilterError {
  double relative, absolute;
};

RESONA_HD FilterError fp32_error(int64_t n) {
  const double nu = static_cast<double>(n) * 0x1p-24;
  return {nu / (1 - nu), static_cast<double>(n) * 0x1p-120};
}

RESONA_HD FilterError mma16_error(int64_t n) {
  return {static_cast<double>(n + 16) * 0x1p-22, static_cast<double>(n) * 0x1p-90};
}

RESONA_HD FilterError tf32x3_error(int64_t n) {
  return {static_cast<double>(n + 16) * 10 * 0x1p-24, static_cast<double>(n) * 0x1p-90};
}

RESONA_HD FilterError tile_error(int64_t n, bool rounded) {
  return {1.01 * fp32_error(n).relative + (rounded ? 0x1.01p-8 : 0.0), static_cast<double>(n) * 0x1p-90};
}

constexpr int64_t kLongestFilterRow = int64_t{1} << 20;

// What pool_chunks writes has either a NaN or a norm of at most this, for rows in the filter's range:
//   sum_e / norm in fp64 is off by less than 2^-30 of its size, for the sum of n <= 2^20 squares is off by
//   less than n 2^-53; squares of fp32 numbers neither overflow nor underflow there;
//   rounding to fp32 and then to the dtype adds at most 2^-24 + 2^-8 (bf16) of each element, and below the
//   dtype's normal range at most 2^-25 (fp16) to each of n elements, hence 2^-25 sqrt(n) <= 2^-15 to the
//   norm.
// An infinite sum makes the norm infinite, so its elements are 0 or NaN.
constexpr double kLargestUnitNorm = 1 + 0x1p-7;

// Whether a tensor core's products of these norms stay far from overflow and underflow. False for NaN.
RESONA_HD bool in_filter_range(double query_norm, double largest_chunk_norm, int64_t n) {
  return query_norm > 0x1p-30 && query_norm < 0x1p30 && largest_chunk_norm < 0x1p30 && n <= kLongestFilterRow;
}

// A chunk whose quick product with the query lies below this scores less than `kth_score`. The slack of
// 2^-20 covers the score's division, its rounding and the rounding of this bound.
RESONA_HD double filter_limit(double kth_score, double query_norm, double largest_chunk_norm,
                              FilterError error) {
  const double wanted = kth_score * query_norm;
  const double bound = error.relative * query_norm * largest_chunk_norm + error.absolute;
  return wanted - 1.01 * bound - std::fabs(wanted) * 0x1p-20;
}

// The same from a quick product: chunks below this rank under those k whose quick products are `kth_product`
// or more. Both sides of the comparison may err.
RESONA_HD double quick_filter_limit(double kth_product, double query_norm, double largest_chunk_norm,
                                    FilterError error) {
  const double bound = error.relative * query_norm * largest_chunk_norm + error.absolute;
  return kth_product - 2.02 * bound - std::fabs(kth_product) * 0x1p-20;
}

}  // namespace resona
