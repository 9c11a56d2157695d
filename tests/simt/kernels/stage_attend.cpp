// The CUDA side of `attend`, from the problem on: the plan and the .cu files themselves.
#include "common/plan_attend_cuda.cpp"
#include "cuda/attend.cu"
#include "cuda/attend_chunk.cu"
#include "cuda/attend_dense.cu"
#include "cuda/attend_query.cu"

#include <cstdlib>

#include "runtime/arguments.h"

namespace {

using namespace resona;

DType dtype_of(const simt::Arguments& a) {
  const std::string& name = a.text("dtype");
  return name == "float32" ? DType::kFloat32 : name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

void* data_of(const simt::Arguments& a, const std::string& name, DType dtype) {
  return size_of(dtype) == 4 ? static_cast<void*>(a.optional_array<uint32_t>(name))
                             : a.optional_array<uint16_t>(name);
}

Rows rows_of(const simt::Arguments& a, const std::string& name, DType dtype) {
  return {data_of(a, name, dtype), a.integer(name + "_batch_stride"), a.integer(name + "_token_stride"),
          a.integer(name + "_head_stride"), dtype};
}

AttendProblem problem_of(const simt::Arguments& a) {
  AttendProblem p{};
  const DType dtype = dtype_of(a);
  Shape& s = p.shape;
  s.batch = a.integer("batch"), s.queries = a.integer("queries"), s.context = a.integer("context");
  s.heads = a.integer("heads"), s.kv_heads = a.integer("kv_heads"), s.head_dim = a.integer("head_dim");
  s.retrieval_heads = a.integer("retrieval_heads");
  s.chunk_size = a.integer("chunk_size"), s.top_k = a.integer("top_k");
  p.packed = {a.optional_array<int32_t>("cu_seqlens"), a.integer("sequences")};
  p.query = rows_of(a, "query", dtype), p.key = rows_of(a, "key", dtype),
  p.value = rows_of(a, "value", dtype);
  p.indices = a.array<int32_t>("indices");
  p.bias = a.optional_array<float>("bias"), p.bias_scale = a.optional_array<float>("bias_scale");
  p.sink = a.optional_array<float>("sink");
  p.scale = std::strtof(a.text("scale").c_str(), nullptr);
  p.distinct = a.integer("distinct") != 0;
  const int64_t row = s.heads * s.head_dim;
  p.out = {data_of(a, "out", dtype), s.queries * row, row, s.head_dim, dtype};
  p.lse = a.optional_array<float>("lse");
  return p;
}

// Ranges of queries and fewer heads than the workspace asks for, for tests that have no 512 MiB to fill.
CudaAttendPlan plan_of(const simt::Arguments& a, const AttendProblem& p) {
  const CudaDevice device{a.integer("sms"), 90, 232448};
  const CudaAttendFacts facts{cuda_facts(a.integer("vector") != 0, p.packed), p.query.dtype, p.distinct,
                              p.bias != nullptr};
  CudaAttendPlan plan = plan_attend_cuda(p.shape, facts, device);
  const int64_t range = a.integer("range"), heads = a.integer("range_heads");
  if (plan.path == AttendPath::kChunk && range + heads > 0)
    size_range(plan, p.shape, range > 0 ? 1 : p.shape.batch, range > 0 ? range : p.shape.queries,
               heads > 0 ? heads : heads_of_list(p.shape), device);
  return plan;
}

void run_plan(const simt::Arguments& a) {
  const CudaAttendPlan plan = plan_of(a, problem_of(a));
  int64_t* facts = a.array<int64_t>("facts");
  facts[0] = plan.workspace_bytes, facts[1] = static_cast<int64_t>(plan.path);
}

void run(const simt::Arguments& a) {
  const AttendProblem p = problem_of(a);
  cuda::attend(p, plan_of(a, p), a.optional_array<uint8_t>("workspace"), {});
}

const simt::Registration registrations[] = {{"stage_attend", run}, {"stage_attend_plan", run_plan}};

}  // namespace
