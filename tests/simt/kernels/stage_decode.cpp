// The CUDA side of `decode_step` and `decode_step_two_level`, from the problem on: the plan and decode.cu
// itself, on arrays from Python.
#include "cuda/decode.cu"

#include "common/plan_decode_cuda.cpp"

#include <cstdlib>

#include "runtime/arguments.h"

namespace {

using namespace resona;

DType dtype_named(const std::string& name) {
  return name == "float32" ? DType::kFloat32 : name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

// Strides of the new token's rows are free, those of the cache are not.
MutableRows rows_of(const simt::Arguments& a, const std::string& name, DType dtype) {
  void* data = size_of(dtype) == 4 ? static_cast<void*>(a.optional_array<uint32_t>(name))
                                   : a.optional_array<uint16_t>(name);
  return {data, a.integer(name + "_batch_stride"), a.integer(name + "_token_stride"),
          a.integer(name + "_head_stride"), dtype};
}

Rows read_only(const MutableRows& r) {
  return {r.data, r.batch_stride, r.token_stride, r.head_stride, r.dtype};
}

DecodeProblem problem_of(const simt::Arguments& a) {
  DecodeProblem p{};
  Shape& s = p.shape;
  s.batch = a.integer("batch"), s.queries = 1, s.context = a.integer("capacity");
  s.heads = a.integer("heads"), s.kv_heads = a.integer("kv_heads"), s.head_dim = a.integer("head_dim");
  s.retrieval_heads = a.integer("retrieval_heads"), s.retrieval_dim = a.integer("retrieval_dim");
  s.chunk_size = a.integer("chunk_size"), s.top_k = a.integer("top_k");
  const DType dtype = dtype_named(a.text("dtype")), embedding = dtype_named(a.text("embedding_dtype"));
  p.query = read_only(rows_of(a, "query", dtype));
  p.key = read_only(rows_of(a, "key", dtype)), p.value = read_only(rows_of(a, "value", dtype));
  p.query_embedding = read_only(rows_of(a, "query_embedding", embedding));
  p.context_embedding = read_only(rows_of(a, "context_embedding", embedding));
  p.key_cache = rows_of(a, "key_cache", dtype), p.value_cache = rows_of(a, "value_cache", dtype);
  p.chunks = rows_of(a, "chunk_embedding", embedding);
  p.open_sum = a.array<float>("open_sum");
  p.history = rows_of(a, "history", embedding), p.history_rows = a.integer("history_rows");
  p.lengths = a.array<int32_t>("lengths");
  p.score_scale = a.optional_array<float>("score_scale"), p.sink = a.optional_array<float>("sink");
  p.scale = std::strtod(a.text("scale").c_str(), nullptr);
  p.indices = a.optional_array<int32_t>("indices"), p.scores = a.optional_array<float>("scores");
  const int64_t row = s.heads * s.head_dim;
  p.out = {size_of(dtype) == 4 ? static_cast<void*>(a.optional_array<uint32_t>("out"))
                               : a.optional_array<uint16_t>("out"),
           row, row, s.head_dim, dtype};
  p.lse = a.optional_array<float>("lse");
  p.superchunk_size = a.integer("superchunk_size"), p.probes = a.integer("probes");
  if (!p.two_level()) return p;
  p.superchunks = rows_of(a, "superchunk_embedding", embedding);
  p.superchunk_sum = a.array<float>("superchunk_sum");
  return p;
}

// Other ranges and splits than the plan's, for tests whose caches are too small to want them.
CudaDecodePlan plan_of(const simt::Arguments& a, const DecodeProblem& p) {
  const auto vector = [](int64_t dim, const auto&... rows) { return (rows_of_16_bytes(rows, dim) && ...); };
  const CudaDecodeFacts facts{p.query.dtype,
                              p.query_embedding.dtype,
                              vector(p.shape.head_dim, p.query, p.key, p.value, p.key_cache, p.value_cache),
                              vector(p.shape.retrieval_dim, p.chunks),
                              p.superchunk_size,
                              p.probes};
  CudaDecodePlan plan = plan_decode_cuda(p.shape, facts, {a.integer("sms"), 90, 232448});
  if (a.integer("splits") > 0) plan.splits = a.integer("splits");
  if (a.integer("range") > 0) {
    const auto cut = [&](CudaDecodeRanges& r, int64_t rows, int64_t wanted) {
      r.range = a.integer("range"), r.lists = ceil_div(rows, r.range), r.kept = std::min(wanted, r.range);
      return p.shape.batch * p.shape.retrieval_heads * r.lists;
    };
    const int64_t chunks = p.shape.context / p.shape.chunk_size;
    if (plan.probes) {
      plan.search_blocks = p.shape.batch + cut(plan.centroids, chunks / p.superchunk_size, p.probes);
      const int64_t searched = std::min(chunks, (p.probes + 1) * p.superchunk_size - 1);
      plan.refine_blocks = cut(plan.chunks, searched, p.shape.top_k);
    } else {
      plan.search_blocks = p.shape.batch + cut(plan.chunks, chunks, p.shape.top_k);
    }
  }
  if (a.integer("own_slots")) plan.shared_slots = false;
  Workspace counting;
  take_decode(plan, p.shape, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

void run_plan(const simt::Arguments& a) {
  const CudaDecodePlan plan = plan_of(a, problem_of(a));
  int64_t* facts = a.array<int64_t>("facts");
  facts[0] = plan.workspace_bytes, facts[1] = plan.tensor_cores, facts[2] = plan.dim, facts[3] = plan.heads;
  facts[4] = plan.probes;
}

void run(const simt::Arguments& a) {
  const DecodeProblem p = problem_of(a);
  for (int64_t step = 0; step < a.integer("times"); ++step)  // as in a graph: nothing between them
    cuda::decode_step(p, plan_of(a, p), a.optional_array<uint8_t>("workspace"), {});
}

const simt::Registration registrations[] = {{"stage_decode", run}, {"stage_decode_plan", run_plan}};

}  // namespace
