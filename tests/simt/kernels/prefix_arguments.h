// Problems of prefix linear attention on arrays from Python, and plans with choices of a test.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "common/plan_prefix_cuda.h"
#include "common/prefix_problem.h"
#include "runtime/arguments.h"

namespace prefix {

using namespace resona;

inline MutableRows rows_of(const simt::Arguments& a, const std::string& name) {
  const std::string& text = a.text("dtype");
  const DType dtype = text == "float32"   ? DType::kFloat32
                      : text == "float16" ? DType::kFloat16
                                          : DType::kBFloat16;
  void* data = size_of(dtype) == 4 ? static_cast<void*>(a.optional_array<uint32_t>(name))
                                   : a.optional_array<uint16_t>(name);
  return {data, a.integer(name + "_batch_stride"), a.integer(name + "_token_stride"),
          a.integer(name + "_head_stride"), dtype};
}

inline Rows read_only(const MutableRows& r) {
  return {r.data, r.batch_stride, r.token_stride, r.head_stride, r.dtype};
}
inline Rows input(const simt::Arguments& a, const std::string& name) { return read_only(rows_of(a, name)); }

inline double scale_of(const simt::Arguments& a) { return std::strtod(a.text("scale").c_str(), nullptr); }

inline PrefixShape shape_of(const simt::Arguments& a) {
  return {a.integer("batch"),       a.integer("tokens"),    a.integer("prefix_rows"), a.integer("heads"),
          a.integer("feature_dim"), a.integer("value_dim"), a.integer("sequences")};
}

inline PrefixProblem problem_of(const simt::Arguments& a) {
  PrefixProblem p{};
  p.shape = shape_of(a);
  p.packed = {a.optional_array<int32_t>("cu_seqlens"), p.shape.sequences};
  p.prefix_lengths = a.optional_array<int32_t>("prefix_lengths");
  p.query = input(a, "query"), p.key = input(a, "key"), p.value = input(a, "value");
  p.prefix_key = input(a, "prefix_key"), p.prefix_value = input(a, "prefix_value");
  p.mask = a.optional_array<uint8_t>("mask");
  p.initial_state = a.optional_array<float>("initial_state");
  p.initial_normalizer = a.optional_array<float>("initial_normalizer");
  p.scale = scale_of(a);
  p.out = rows_of(a, "out");
  p.state = a.optional_array<float>("state"), p.normalizer = a.optional_array<float>("normalizer");
  return p;
}

// Shorter pieces and smaller parts than the plan's, for tests too small to want them.
template <class Take>
void change(CudaPrefixPlan& plan, const simt::Arguments& a, const PrefixShape& s, const Take& take) {
  if (a.integer("segment") > 0) {
    plan.segment = a.integer("segment");
    plan.token_pieces = std::max<int64_t>(1, (s.tokens + plan.segment - 1) / plan.segment);
    plan.prefix_pieces = (s.prefix_rows + plan.segment - 1) / plan.segment;
  }
  if (a.integer("batch_part") > 0) plan.batch = a.integer("batch_part");
  Workspace counting;
  take(plan, s, counting);
  plan.workspace_bytes = counting.bytes();
}

inline CudaPrefixFacts facts_of(const PrefixProblem& p) {
  const int64_t f = p.shape.feature_dim, v = p.shape.value_dim;
  const bool vector = rows_of_16_bytes(p.query, f) && rows_of_16_bytes(p.key, f) &&
                      rows_of_16_bytes(p.value, v) && rows_of_16_bytes(p.prefix_key, f) &&
                      rows_of_16_bytes(p.prefix_value, v);
  return {p.packed.cu_seqlens != nullptr, vector};
}

inline CudaDevice device_of(const simt::Arguments& a) {
  return {a.integer("sms"), 90, a.integer("shared_bytes")};
}

inline void report(const simt::Arguments& a, const CudaPrefixPlan& plan) {
  int64_t* facts = a.array<int64_t>("facts");
  facts[0] = plan.workspace_bytes, facts[1] = plan.token_pieces, facts[2] = plan.layout.slices;
  facts[3] = plan.vector_rows, facts[4] = plan.vector_values;
}

}  // namespace prefix
