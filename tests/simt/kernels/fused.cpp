// The CUDA side of `fused_retrieve_attend`, from the problem on: fused.cu, its plan and search_attend.cu. The
// other stages are those of the runners search, pool and stage_attend.
#include "cuda/fused.cu"
#include "cuda/search_attend.cu"

#include "common/plan_fused_cuda.cpp"

#include <cstdlib>

#include "runtime/arguments.h"
#include "runtime/launches.h"

namespace {

using namespace resona;

DType dtype_named(const std::string& name) {
  return name == "float32" ? DType::kFloat32 : name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

// Contiguous [B, tokens, heads, dim].
MutableRows rows_to_write(const simt::Arguments& a, const char* name, DType dtype, int64_t tokens,
                          int64_t heads, int64_t dim) {
  void* data = size_of(dtype) == 4 ? static_cast<void*>(a.optional_array<uint32_t>(name))
                                   : a.optional_array<uint16_t>(name);
  return {data, tokens * heads * dim, heads * dim, dim, dtype};
}

Rows rows_of(const simt::Arguments& a, const char* name, DType dtype, int64_t tokens, int64_t heads,
             int64_t dim) {
  const MutableRows r = rows_to_write(a, name, dtype, tokens, heads, dim);
  return {r.data, r.batch_stride, r.token_stride, r.head_stride, dtype};
}

Shape shape_of(const simt::Arguments& a) {
  return {a.integer("batch"),           a.integer("queries"),
          a.integer("context"),         a.integer("heads"),
          a.integer("kv_heads"),        a.integer("head_dim"),
          a.integer("retrieval_heads"), a.integer("retrieval_dim"),
          a.integer("chunk_size"),      a.integer("top_k")};
}

FusedProblem problem_of(const simt::Arguments& a) {
  const Shape s = shape_of(a);
  const DType dtype = dtype_named(a.text("dtype")), embedding = dtype_named(a.text("embedding_dtype"));
  const DeviceSequences packed{a.optional_array<int32_t>("cu_seqlens"), a.integer("sequences")};
  FusedProblem p{};
  p.pool.shape = p.retrieve.shape = p.attend.shape = s;
  p.pool.packed = p.retrieve.packed = p.attend.packed = packed;
  p.pool.context = rows_of(a, "context_embedding", embedding, s.context, s.retrieval_heads, s.retrieval_dim);
  p.retrieve.query = rows_of(a, "query_embedding", embedding, s.queries, s.retrieval_heads, s.retrieval_dim);
  p.retrieve.indices = a.optional_array<int32_t>("indices");
  p.retrieve.scores = a.optional_array<float>("scores");
  AttendProblem& attend = p.attend;
  attend.query = rows_of(a, "query", dtype, s.queries, s.heads, s.head_dim);
  attend.key = rows_of(a, "key", dtype, s.context, s.kv_heads, s.head_dim);
  attend.value = rows_of(a, "value", dtype, s.context, s.kv_heads, s.head_dim);
  attend.indices = p.retrieve.indices;
  attend.bias_scale = a.optional_array<float>("score_scale");
  if (attend.bias_scale) attend.bias = p.retrieve.scores;
  attend.sink = a.optional_array<float>("sink");
  attend.scale = std::strtof(a.text("scale").c_str(), nullptr);
  attend.distinct = true;
  attend.out = rows_to_write(a, "out", dtype, s.queries, s.heads, s.head_dim);
  attend.lse = a.optional_array<float>("lse");
  return p;
}

CudaFusedPlan plan_of(const simt::Arguments& a, const FusedProblem& p) {
  const Shape& s = p.pool.shape;
  const DType dtype = p.attend.query.dtype, embedding = p.pool.context.dtype;
  const CudaAttendFacts attend{cuda_facts(s.head_dim * size_of(dtype) % 16 == 0, p.attend.packed), dtype,
                               true, p.attend.bias_scale != nullptr};
  const bool vector_context = s.retrieval_dim * size_of(embedding) % 16 == 0;
  const CudaFusedFacts facts{embedding, vector_context, attend};
  CudaDevice device{a.integer("sms"), 90, 232448};
  if (a.integer("apart") != 0) device.tuning.attended_keys = 0;
  CudaFusedPlan plan = plan_fused_cuda(s, facts, device);
  // As if there were room for so many batch entries only.
  if (a.integer("part") > 0) divide(plan, a.integer("part"), s, facts, device);
  if (const int64_t heads = a.integer("range_heads")) {  // fewer at a time than there is room for
    plan.launches += 2 * ((s.kv_heads / s.retrieval_heads + heads - 1) / heads - 1);
    plan.part.attend.range_heads = plan.last.attend.range_heads = heads;
  }
  return plan;
}

void run_plan(const simt::Arguments& a) {
  const CudaFusedPlan plan = plan_of(a, problem_of(a));
  int64_t* facts = a.array<int64_t>("facts");
  facts[0] = plan.workspace_bytes, facts[1] = plan.launches,
  facts[2] = static_cast<int64_t>(plan.part.attend.path), facts[3] = plan.part.attends;
}

void run(const simt::Arguments& a) {
  const FusedProblem p = problem_of(a);
  cuda::retrieve_attend(p, plan_of(a, p), a.optional_array<uint8_t>("workspace"), {});
  a.array<int64_t>("launches")[0] = simt::launches_so_far();
}

const simt::Registration registrations[] = {{"fused", run}, {"fused_plan", run_plan}};

}  // namespace
