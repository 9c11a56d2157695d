// The end of a row of attention, the same whichever way its sums came about.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/attend_tile.h"

namespace resona::cpu {

// Adds the sink, divides and writes one row; store(factor, accumulator, out) does the latter two.
template <class A, class Store>
void finish_row(const AttendProblem& p, int64_t batch, int64_t query, int64_t head, A peak, A total,
                A* accumulator, const Store& store) {
  const A minus_infinity = -std::numeric_limits<A>::infinity();
  const A sink = p.sink == nullptr ? minus_infinity : static_cast<const A*>(p.sink)[head];
  if (sink == minus_infinity && std::isfinite(peak) && total > 0) {  // the same without exponentials of 0
    store(1 / total, accumulator, p.out.at(batch, query, head));
    static_cast<A*>(p.lse)[head_offset(p.shape, batch, query, head)] = peak + std::log(total);
    return;
  }
  const A top = sink > peak ? sink : peak;
  const A reference = top == minus_infinity ? A(0) : top;
  const A decay = std::exp(peak - reference);
  const A sum = total * decay + std::exp(sink - reference);
  const bool nothing = sum == 0;
  const A factor = nothing ? A(0) : decay / sum;
  if (nothing) std::fill_n(accumulator, p.shape.head_dim, A(0));  // a weight of 0 times an infinite value
  store(factor, accumulator, p.out.at(batch, query, head));
  static_cast<A*>(p.lse)[head_offset(p.shape, batch, query, head)] =
      nothing ? minus_infinity : reference + std::log(sum);
}

}  // namespace resona::cpu
