// The CUDA side of the gradients of `attend`, from the problem on: attend_backward.cu itself, on arrays from
// Python.
#include "cuda/attend_backward.cu"

#include <algorithm>
#include <cstdlib>

#include "common/plan_attend_backward_cuda.cpp"

#include "runtime/arguments.h"

namespace {

using namespace resona;

DType dtype_named(const std::string& name) {
  return name == "float32" ? DType::kFloat32 : name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

template <class AnyRows>
AnyRows tensor(const simt::Arguments& a, const std::string& name, DType dtype) {
  void* data = size_of(dtype) == 4 ? static_cast<void*>(a.optional_array<uint32_t>(name))
                                   : a.optional_array<uint16_t>(name);
  return {data, a.integer(name + "_batch_stride"), a.integer(name + "_token_stride"),
          a.integer(name + "_head_stride"), dtype};
}

AttendProblem forward_of(const simt::Arguments& a, DType dtype) {
  AttendProblem p{};
  Shape& s = p.shape;
  s.batch = a.integer("batch"), s.queries = a.integer("queries"), s.context = a.integer("context");
  s.heads = a.integer("heads"), s.kv_heads = a.integer("kv_heads"), s.head_dim = a.integer("head_dim");
  s.retrieval_heads = a.integer("retrieval_heads"), s.chunk_size = a.integer("chunk_size");
  s.top_k = a.integer("top_k");
  p.packed = {a.optional_array<int32_t>("cu_seqlens"), a.integer("sequences")};
  p.query = tensor<Rows>(a, "query", dtype);
  p.key = tensor<Rows>(a, "key", dtype);
  p.value = tensor<Rows>(a, "value", dtype);
  p.indices = a.optional_array<int32_t>("indices");
  p.bias = a.optional_array<float>("bias");
  p.bias_dtype = DType::kFloat32;
  p.bias_scale = a.optional_array<float>("bias_scale");
  p.sink = a.optional_array<float>("sink");
  p.scale = std::strtod(a.text("scale").c_str(), nullptr);
  p.out = tensor<MutableRows>(a, "out", dtype);
  p.lse = a.optional_array<float>("lse");
  return p;
}

AttendBackwardProblem problem_of(const simt::Arguments& a) {
  const DType dtype = dtype_named(a.text("dtype"));
  AttendBackwardProblem p{};
  p.forward = forward_of(a, dtype);
  p.out_gradient = tensor<Rows>(a, "out_gradient", dtype);
  p.lse_gradient = a.optional_array<float>("lse_gradient");
  p.query_gradient = tensor<MutableRows>(a, "query_gradient", dtype);
  p.key_gradient = tensor<MutableRows>(a, "key_gradient", dtype);
  p.value_gradient = tensor<MutableRows>(a, "value_gradient", dtype);
  p.bias_gradient = a.optional_array<float>("bias_gradient");
  p.sink_gradient = a.optional_array<float>("sink_gradient");
  return p;
}

// What the plan says, unless the test says otherwise.
CudaAttendBackwardPlan plan_of(const simt::Arguments& a, const AttendBackwardProblem& p) {
  const Shape& s = p.forward.shape;
  CudaAttendBackwardPlan plan = plan_attend_backward_cuda(
      s, p.forward.query.dtype, cuda_facts(a.integer("vector") != 0, p.forward.packed),
      p.forward.bias != nullptr, p.forward.sink != nullptr, {a.integer("sms"), 90, 232448});
  const auto over = [&](const char* name, int64_t& field) {
    if (a.integers.count(name)) field = a.integer(name);
  };
  over("plan_batch", plan.batch), over("plan_queries", plan.queries), over("plan_heads", plan.heads);
  over("lane_keys", plan.lane_keys), over("segment", plan.segment), over("item_blocks", plan.item_blocks),
      over("row_blocks", plan.row_blocks);
  const Shape part = part_of(plan, s, 0, 0);
  const int64_t rows = part.batch * part.queries * s.retrieval_heads * s.top_k * (s.heads / s.kv_heads);
  plan.slab_rows = 2 * ((rows + plan.segment - 1) / plan.segment);
  Workspace counting;
  take_attend_backward(plan, s, counting);
  plan.workspace_bytes = counting.bytes() + plan_index_cuda(part, plan.device).workspace_bytes;
  return plan;
}

void run_plan(const simt::Arguments& a) {
  const CudaAttendBackwardPlan plan = plan_of(a, problem_of(a));
  const int64_t fields[] = {plan.workspace_bytes, plan.batch, plan.queries, plan.heads, plan.lane_keys};
  std::copy_n(fields, 5, a.array<int64_t>("plan"));
}

void run_backward(const simt::Arguments& a) {
  const AttendBackwardProblem p = problem_of(a);
  cuda::attend_backward(p, plan_of(a, p), a.array<uint8_t>("workspace"), {});
}

const simt::Registration registrations[] = {{"attend_backward", run_backward},
                                            {"attend_backward_plan", run_plan}};

}  // namespace
