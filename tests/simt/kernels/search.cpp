// The CUDA side of `retrieve`, from the problem on: search.cu itself, on arrays from Python.
#include "cuda/search.cu"

#include "common/plan_search_cuda.cpp"

#include "runtime/arguments.h"

namespace {

using namespace resona;

DType dtype_of(const std::string& name) {
  return name == "float32" ? DType::kFloat32 : name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

Rows rows_of(const simt::Arguments& a, const std::string& name, DType dtype) {
  const void* data = size_of(dtype) == 4 ? static_cast<const void*>(a.optional_array<uint32_t>(name))
                                         : a.optional_array<uint16_t>(name);
  return {data, a.integer(name + "_batch_stride"), a.integer(name + "_token_stride"),
          a.integer(name + "_head_stride"), dtype};
}

CudaSearchPlan plan_of(const simt::Arguments& a, const RetrieveProblem& p) {
  const CudaSearchFacts facts{p.query.dtype, p.unit_chunks, cuda_facts(false, p.packed).sequences};
  CudaSearchPlan plan = plan_search_cuda(p.shape, facts, {a.integer("sms"), 90, 232448});
  const auto over = [&](const char* name, auto& field) {
    if (a.integers.count(name))
      field = static_cast<std::remove_reference_t<decltype(field)>>(a.integer(name));
  };
  over("splits", plan.splits), over("passes", plan.passes), over("bag", plan.bag_per_lane);
  over("candidates", plan.candidates);
  over("window_tiles", plan.window_tiles), over("exact_blocks", plan.exact_blocks);
  plan.norms = plan.norms && plan.candidates;
  if (!plan.candidates && plan.exact_blocks == 0) plan.exact_blocks = 6;
  Workspace counting;
  take_chunk_begin(plan.sequences, counting);
  take_search(plan, p.shape, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

RetrieveProblem problem_of(const simt::Arguments& a) {
  RetrieveProblem p{};
  const DType dtype = dtype_of(a.text("dtype"));
  Shape& s = p.shape;
  s.batch = a.integer("batch"), s.queries = a.integer("queries"), s.context = a.integer("context");
  s.retrieval_heads = a.integer("heads"), s.retrieval_dim = a.integer("dim");
  s.chunk_size = a.integer("chunk_size"), s.top_k = a.integer("top_k");
  p.query = rows_of(a, "query", dtype), p.chunks = rows_of(a, "chunk", dtype);
  p.unit_chunks = a.integers.count("unit") != 0;
  p.packed = {a.optional_array<int32_t>("cu_seqlens"), a.integer("sequences")};
  return p;
}

void run_plan(const simt::Arguments& a) {
  const CudaSearchPlan plan = plan_of(a, problem_of(a));
  int64_t* facts = a.array<int64_t>("facts");
  facts[0] = plan.workspace_bytes, facts[1] = plan.pinned, facts[2] = plan.bag_per_lane;
}

void run_search(const simt::Arguments& a) {
  RetrieveProblem p = problem_of(a);
  p.indices = a.array<int32_t>("indices"), p.scores = a.array<float>("scores");
  cuda::retrieve(p, plan_of(a, p), a.array<uint8_t>("workspace"), {});
}

const simt::Registration registrations[] = {{"search", run_search}, {"search_plan", run_plan}};

}  // namespace
