// What prefix.cu and prefix_backward.cu share: from a problem to what kernels read, and the sums of pieces.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/plan_prefix_cuda.h"
#include "cuda/attend_launch.cuh"
#include "cuda/launch.cuh"
#include "cuda/prefix_forward.cuh"

namespace resona::cuda {

static_assert(PrefixConfig::kThreads == kPrefixThreads, "plans count with these");

inline PrefixScale prefix_scale(double scale) {
  const double second = scale / std::sqrt(2.0);
  PrefixScale s{};
  s.linear = static_cast<float>(scale);
  s.diagonal = static_cast<float>(scale * scale / 2), s.off_diagonal = static_cast<float>(scale * scale);
  s.pack_linear = static_cast<float>(1 / std::sqrt(scale)), s.pack_second = static_cast<float>(1 / second);
  s.unpack_linear = static_cast<float>(std::sqrt(scale)), s.unpack_second = static_cast<float>(second);
  return s;
}

template <class T>
HeadRows<T> head_rows_to_write(const MutableRows& r) {
  return {static_cast<T*>(r.data), r.batch_stride, r.token_stride, r.head_stride};
}

template <class T>
PrefixParams<T> prefix_params(const PrefixProblem& p, const CudaPrefixPlan& plan, int64_t first,
                              float* slots) {
  PrefixParams<T> a{};
  a.query = head_rows<T>(p.query), a.key = head_rows<T>(p.key), a.value = head_rows<T>(p.value);
  a.prefix_key = head_rows<T>(p.prefix_key), a.prefix_value = head_rows<T>(p.prefix_value);
  a.mask = p.mask;
  a.cu_seqlens = p.packed.cu_seqlens, a.prefix_lengths = p.prefix_lengths;
  a.initial = {static_cast<const float*>(p.initial_state), static_cast<const float*>(p.initial_normalizer)};
  a.out = head_rows_to_write<T>(p.out);
  a.state = static_cast<float*>(p.state), a.normalizer = static_cast<float*>(p.normalizer);
  a.first_sequence = first;
  a.tokens = p.shape.tokens, a.prefix_rows = p.shape.prefix_rows;
  a.heads = static_cast<int>(p.shape.heads);
  a.layout = plan.layout;
  a.scale = prefix_scale(p.scale);
  a.vector_rows = plan.vector_rows, a.vector_values = plan.vector_values;
  a.segment = plan.segment, a.token_pieces = plan.token_pieces, a.prefix_pieces = plan.prefix_pieces;
  a.slots = slots;
  return a;
}

// Starts the kernels of a part, each behind the one before it.
struct PrefixLauncher {
  const CudaPrefixPlan& plan;
  int64_t lanes;  // sequences x heads of the part
  Stream stream;
  bool first = true;

  // A block for each lane, piece and slice.
  template <class... Parameters, class... Arguments>
  void operator()(const char* name, int64_t pieces, void (*kernel)(Parameters...),
                  const Arguments&... arguments) {
    start(name, pieces, plan.shared_bytes, kernel, arguments...);
  }

  template <class T>
  void scan(const PrefixParams<T>& p, const PrefixStates& from, bool backward) {
    const int64_t blocks = (plan.layout.state_size() + kPrefixThreads - 1) / kPrefixThreads;
    start("prefix_scan_kernel", blocks, 0, prefix_scan_kernel<T>, p, from, backward);
  }

  template <class... Parameters, class... Arguments>
  void start(const char* name, int64_t pieces, int64_t shared_bytes, void (*kernel)(Parameters...),
             const Arguments&... arguments) {
    const int64_t blocks = saturated_product({lanes, plan.layout.slices, pieces});
    launch({name, {blocks}, static_cast<int>(kPrefixThreads), shared_bytes, !first, plan.reason}, stream,
           kernel, arguments...);
    first = false;
  }
};

// What each piece starts from, in its slot.
template <class T>
void start_pieces(PrefixLauncher& start, const PrefixParams<T>& p) {
  if (!start.plan.is_cut()) return;
  start("prefix_sums_kernel", p.token_pieces - 1 + p.prefix_pieces, prefix_sums_kernel<T>, p);
  start.scan(p, p.initial, false);
}

// Calls body(first sequence, sequences) for every part of the batch; packed sequences are one.
template <class Body>
void for_each_part(const PrefixProblem& p, const CudaPrefixPlan& plan, const Body& body) {
  if (p.packed.cu_seqlens != nullptr) return body(int64_t{0}, p.packed.count);
  for (int64_t first = 0; first < p.shape.batch; first += plan.batch)
    body(first, std::min(plan.batch, p.shape.batch - first));
}

}  // namespace resona::cuda
