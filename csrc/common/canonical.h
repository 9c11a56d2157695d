// The arithmetic that decides which chunks are retrieved. CPU, CUDA, prefill and decode all run these
// lines, so they agree bit for bit; `resona_ext/reference.py` states the same in PyTorch.
//
// Two facts make that possible. The product of two float32 numbers is exact in float64, so fusing the
// multiplication with the addition changes nothing; and the order of the sum is fixed below. Host code
// is compiled with -ffp-contract=off, which float64 inputs (tests only) need.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace resona::canonical {

constexpr int kLanes = 8;  // element e belongs to partial sum e mod 8

// The eight partial sums, added at distance 4, 2, 1.
RESONA_HD double fold(const double* partial) {
  const double a = partial[0] + partial[4], b = partial[1] + partial[5];
  const double c = partial[2] + partial[6], d = partial[3] + partial[7];
  return (a + c) + (b + d);
}

template <class A>
RESONA_HD double dot(const A* a, const A* b, int64_t n) {
  double partial[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      partial[lane] += static_cast<double>(a[e + lane]) * static_cast<double>(b[e + lane]);
  }
  for (int lane = 0; e < n; ++e, ++lane)
    partial[lane] += static_cast<double>(a[e]) * static_cast<double>(b[e]);
  return fold(partial);
}

template <class A>
RESONA_HD double norm(const A* a, int64_t n) {
  return std::sqrt(dot(a, a, n));
}

// One element of a unit-norm chunk; a zero-norm chunk stays zero.
template <class A>
RESONA_HD A unit(A sum, double norm) {
  return norm == 0 ? A(0) : static_cast<A>(static_cast<double>(sum) / norm);
}

// <query, chunk> / |query|, rounded once, -0 made +0; a zero-norm query scores 0 everywhere.
template <class A>
RESONA_HD A score(double dot, double query_norm) {
  return query_norm == 0 ? A(0) : static_cast<A>(dot / query_norm) + A(0);
}

// The chunks (0, 1, ...) that lie wholly before `position`.
RESONA_HD int64_t eligible_chunks(int64_t position, int64_t chunk_size) { return position / chunk_size; }

// How many of the eligible chunks a two-level search looks at: those of m superchunks, and of the open one.
RESONA_HD int64_t searched_chunks(int64_t eligible, int64_t superchunk_size, int64_t probes) {
  const int64_t whole = eligible / superchunk_size;
  return (whole < probes ? whole : probes) * superchunk_size + eligible % superchunk_size;
}

// Whether a chunk met later, hence of higher index, ranks above one met before. A NaN ranks below every
// number, and equals go to the lower index.
template <class A>
RESONA_HD bool later_ranks_above(A later, A earlier) {
  if (later != later) return false;
  return earlier != earlier || later > earlier;
}

}  // namespace resona::canonical
