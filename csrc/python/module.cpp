// resona_ext._C: plans and build facts for people and tests. Tensors never pass through here, so it knows
// nothing of torch and the package works without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/build_info.h"
#include "common/plan.h"
#include "common/plan_attend_backward_cuda.h"
#include "common/plan_attend_cuda.h"
#include "common/plan_cuda.h"
#include "common/plan_decode_cuda.h"
#include "common/plan_fused_cuda.h"
#include "common/plan_prefix.h"
#include "common/plan_prefix_cuda.h"
#include "common/plan_search_cuda.h"
#include "common/plan_two_level_cuda.h"

namespace py = pybind11;

namespace {

struct Stage {
  std::string name, kernel, reason;
  std::map<std::string, int64_t> parameters;
};

struct PlanView {
  std::vector<Stage> stages;
  int64_t workspace_bytes;
};

void require(bool ok, const char* argument, const std::string& expected, const std::string& got) {
  if (!ok)
    throw py::value_error("plan: " + std::string(argument) + ": expected " + expected + ", got " + got);
}

resona::DType dtype_named(const char* argument, const std::string& name) {
  if (name == "float32") return resona::DType::kFloat32;
  if (name == "float16") return resona::DType::kFloat16;
  if (name == "bfloat16") return resona::DType::kBFloat16;
  if (name == "float64") return resona::DType::kFloat64;
  require(false, argument, "float32, float16, bfloat16 or float64", name);
  return resona::DType::kFloat32;
}

void check(const resona::Shape& s) {
  const auto at_least = [](const char* argument, int64_t value, int64_t least) {
    require(value >= least, argument, "at least " + std::to_string(least), std::to_string(value));
  };
  // The operator has no such limits of its own: tensors of these sizes could not exist.
  const auto at_most = [](const char* argument, int64_t value, int64_t most) {
    require(value <= most, argument, "at most " + std::to_string(most), std::to_string(value));
  };
  at_most("context", s.context, (int64_t{1} << 31) - 1);
  for (const auto& [argument, value] : {std::pair("batch", s.batch), std::pair("heads", s.heads),
                                        std::pair("retrieval_dim", s.retrieval_dim)})
    at_most(argument, value, int64_t{1} << 24);
  at_least("batch", s.batch, 0);
  at_least("queries", s.queries, 0);
  at_least("kv_heads", s.kv_heads, 1);
  at_least("heads", s.heads, 1);
  at_least("retrieval_heads", s.retrieval_heads, 1);
  at_least("retrieval_dim", s.retrieval_dim, 1);
  at_least("chunk_size", s.chunk_size, 1);
  at_least("top_k", s.top_k, 1);
  require(s.queries <= s.context, "queries", "at most context = " + std::to_string(s.context),
          std::to_string(s.queries));
  require(s.head_dim >= 1 && s.head_dim <= 256, "head_dim", "1 to 256", std::to_string(s.head_dim));
  require(s.heads % s.kv_heads == 0, "heads", "a multiple of kv_heads = " + std::to_string(s.kv_heads),
          std::to_string(s.heads));
  require(s.kv_heads % s.retrieval_heads == 0, "retrieval_heads",
          "1 or a divisor of kv_heads = " + std::to_string(s.kv_heads), std::to_string(s.retrieval_heads));
}

// What search="two_level" would take in place of "search".
resona::TwoLevelProblem two_level_problem(const resona::Shape& s, resona::DType embeddings) {
  resona::TwoLevelProblem p{};
  p.retrieve.shape = s;
  p.retrieve.query.dtype = p.retrieve.chunks.dtype = embeddings;
  p.plan = resona::plan_two_level(s, std::nullopt, std::nullopt);
  return p;
}

Stage two_level_stage(const resona::TwoLevelProblem& p, const char* kernel, const char* what, int64_t size) {
  return {"two_level",
          p.is_exact() ? "exact" : kernel,
          p.plan.reason,
          {{"superchunk_size", p.plan.superchunk_size}, {"probes", p.plan.probes}, {what, size}}};
}

// list_chunks is of the backward pass, which always goes chunk by chunk.
std::map<std::string, int64_t> attend_parameters(const resona::AttendPlan& p) {
  if (p.by_query)
    return {
        {"query_block", p.query_block}, {"heads_per_task", p.heads_per_task}, {"list_chunks", p.list_chunks}};
  std::map<std::string, int64_t> parameters{{"query_range", p.query_range},
                                            {"row_tile", p.row_tile},
                                            {"key_tile", p.key_tile},
                                            {"list_chunks", p.list_chunks}};
  if (p.kept_tiles > 0) parameters["kept_tiles"] = p.kept_tiles;
  return parameters;
}

PlanView cpu_plan(const resona::Shape& s, resona::DType rows, resona::DType embeddings, int64_t threads,
                  const std::string& isa) {
  require(threads >= 1, "threads", "at least 1", std::to_string(threads));
  const bool tiles = isa == "amx" || isa == "avx512_bf16";
  const bool known = tiles || isa == "avx512" || isa == "avx2" || isa == "portable";
  require(known, "isa", "amx, avx512_bf16, avx512, avx2 or portable", isa);
  const resona::Plan p = resona::make_plan(s, rows, embeddings, {threads, tiles});
  const resona::TwoLevelProblem two_level = two_level_problem(s, embeddings);
  const resona::SearchPlan refine = resona::plan_refine(two_level, {threads, tiles});
  return {{{"pool", p.pool.kernel, p.pool.reason, {{"chunks_per_task", p.pool.chunks_per_task}}},
           {"search",
            p.search.kernel,
            p.search.reason,
            {{"query_block", p.search.query_block}, {"chunk_block", p.search.chunk_block}}},
           two_level_stage(two_level, refine.kernel, "query_block", refine.query_block),
           {"attend", p.attend.kernel, p.attend.reason, attend_parameters(p.attend)}},
          p.workspace_bytes};
}

Stage pool_stage(const char* name, const resona::CudaPoolPlan& p) {
  return {name,
          p.kernel,
          p.reason,
          {{"lanes", p.lanes},
           {"vector", p.vector},
           {"blocks", p.blocks},
           {"workspace_bytes", p.workspace_bytes}}};
}

Stage index_stage(const resona::CudaIndexPlan& p) {
  if (!p.quick)
    return {"index",
            p.kernel,
            p.reason,
            {{"passes", p.passes},
             {"digit_bits", p.digit_bits},
             {"tiles", p.tiles},
             {"slot_blocks", p.slot_blocks},
             {"key_blocks", p.key_blocks}}};
  return {"index",
          p.kernel,
          p.reason,
          {{"query_tiles", p.query_tiles},
           {"block_tiles", p.block_tiles},
           {"blocks", p.blocks},
           {"shared_bytes", p.shared_bytes}}};
}

Stage attend_stage(const resona::CudaAttendPlan& p) {
  std::map<std::string, int64_t> parameters{
      {"dim", p.dim}, {"vector", p.vector}, {"blocks", p.blocks}, {"workspace_bytes", p.workspace_bytes}};
  if (p.path == resona::AttendPath::kQuery || p.path == resona::AttendPath::kQueryMma)
    parameters.insert({{"heads", p.heads}, {"splits", p.splits}});
  if (p.path == resona::AttendPath::kChunk)
    parameters.insert({{"range_batch", p.range_batch},
                       {"range_queries", p.range_queries},
                       {"range_heads", p.range_heads},
                       {"item_rows", p.item_rows},
                       {"key_rows", p.key_rows},
                       {"key_slots", p.key_slots},
                       {"ahead", p.ahead},
                       {"half_partials", p.half_partials},
                       {"index_quick", p.index.quick},
                       {"merge_blocks", p.merge_blocks}});
  return {"attend", p.kernel, p.reason, parameters};
}

Stage attend_backward_stage(const resona::CudaAttendBackwardPlan& p) {
  return {"attend_backward",
          p.kernel,
          p.reason,
          {{"batch", p.batch},
           {"queries", p.queries},
           {"heads", p.heads},
           {"width", p.width},
           {"tile", p.tile},
           {"lane_keys", p.lane_keys},
           {"partials", p.partials},
           {"segment", p.segment},
           {"vector", p.vector},
           {"normalise", p.normalise},
           {"item_blocks", p.item_blocks},
           {"row_blocks", p.row_blocks},
           {"workspace_bytes", p.workspace_bytes}}};
}

Stage search_stage(const resona::CudaSearchPlan& p) {
  return {"search",
          p.kernel,
          p.reason,
          {{"bag_per_lane", p.bag_per_lane},
           {"passes", p.passes},
           {"splits", p.splits},
           {"pinned", p.pinned},
           {"window_tiles", p.window_tiles},
           {"norm_blocks", p.norms ? p.norm_blocks : 0},
           {"exact_blocks", p.exact_blocks},
           {"workspace_bytes", p.workspace_bytes}}};
}

// One new token per sequence, in a cache of `context` tokens.
Stage decode_stage(const char* name, const resona::CudaDecodePlan& p) {
  std::map<std::string, int64_t> parameters{{"range", p.chunks.range},
                                            {"lists", p.chunks.lists},
                                            {"kept", p.chunks.kept},
                                            {"search_blocks", p.search_blocks},
                                            {"dim", p.dim},
                                            {"heads", p.heads},
                                            {"vector", p.vector_rows},
                                            {"splits", p.splits},
                                            {"attend_blocks", p.attend_blocks()},
                                            {"workspace_bytes", p.workspace_bytes}};
  if (p.probes)
    parameters.insert({{"superchunk_size", p.superchunk_size},
                       {"probes", p.probed},
                       {"centroid_range", p.centroids.range},
                       {"centroid_lists", p.centroids.lists},
                       {"centroids_kept", p.centroids.kept},
                       {"refine_blocks", p.refine_blocks}});
  return {name, p.kernel, p.reason, parameters};
}

// The fused call, its stages, and what else has CUDA kernels, for tensors as torch allocates them.
PlanView cuda_plan(const resona::Shape& s, resona::DType rows, resona::DType embeddings, int64_t sm,
                   int64_t sms, const std::map<std::string, int64_t>& tuning) {
  require(sm >= 80, "sm", "at least 80", std::to_string(sm));
  require(sms >= 1 && sms <= 1 << 16, "sms", "1 to 65536", std::to_string(sms));
  resona::CudaDevice device = resona::typical_cuda_device(sm, sms);
  for (const auto& [name, value] : tuning) {
    const resona::TuningField* field = resona::find_tuning_field(name);
    require(field != nullptr, "tuning", "names of CudaTuning", name);
    const std::string range = std::to_string(field->least) + " to " + std::to_string(field->most);
    require(value >= field->least && value <= field->most, "tuning", name + " of " + range,
            std::to_string(value));
    device.tuning.*field->value = value;
  }
  const bool vector_rows = s.retrieval_dim * resona::size_of(embeddings) % 16 == 0;
  const resona::CudaFacts facts{vector_rows, resona::CudaFacts::kNotPacked};
  const resona::CudaFacts row_facts{s.head_dim * resona::size_of(rows) % 16 == 0, facts.sequences};
  const resona::CudaFusedPlan fused =
      resona::plan_fused_cuda(s, {embeddings, vector_rows, {row_facts, rows, true, false}}, device);
  const resona::TwoLevelProblem two_level = two_level_problem(s, embeddings);
  const resona::CudaTwoLevelPlan two_level_plan = resona::plan_two_level_cuda(two_level, facts, device);
  const resona::CudaPoolPlan pool_backward = resona::plan_pool_backward_cuda(s, facts, device);
  const resona::CudaRetrieveBackwardPlan backward = resona::plan_retrieve_backward_cuda(s, facts, device);
  const resona::CudaAttendBackwardPlan attend_backward =
      resona::plan_attend_backward_cuda(s, rows, row_facts, false, false, device);
  resona::CudaDecodeFacts decode_facts{rows, embeddings, row_facts.vector_rows, vector_rows};
  const resona::CudaDecodePlan decode = resona::plan_decode_cuda(s, decode_facts, device);
  decode_facts.superchunk_size = two_level.plan.superchunk_size;
  decode_facts.probes = two_level.plan.probes;
  const resona::CudaDecodePlan decode_two_level = resona::plan_decode_cuda(s, decode_facts, device);
  return {
      {{"fused",
        fused.kernel,
        fused.reason,
        {{"batch", fused.batch},
         {"launches", fused.launches},
         {"attends", fused.part.attends},
         {"chunk_bytes", fused.chunk_bytes},
         {"workspace_bytes", fused.workspace_bytes}}},
       pool_stage("pool", fused.part.pool),
       search_stage(fused.part.search),
       two_level_stage(two_level, two_level_plan.kernel, "workspace_bytes", two_level_plan.workspace_bytes),
       attend_stage(fused.part.attend),
       attend_backward_stage(attend_backward),
       pool_stage("pool_backward", pool_backward),
       index_stage(backward.index),
       {"retrieve_backward",
        backward.kernel,
        backward.reason,
        {{"batch", backward.batch},
         {"lanes", backward.lanes},
         {"vector", backward.vector},
         {"segment", backward.segment},
         {"query_blocks", backward.query_blocks},
         {"segment_blocks", backward.segment_blocks},
         {"chunk_blocks", backward.chunk_blocks},
         {"workspace_bytes", backward.workspace_bytes}}},
       decode_stage("decode", decode),
       decode_stage("decode_two_level", decode_two_level)},
      fused.workspace_bytes};
}

PlanView make_plan(int64_t batch, int64_t queries, int64_t context, int64_t heads, int64_t kv_heads,
                   int64_t head_dim, int64_t retrieval_heads, int64_t retrieval_dim, int64_t chunk_size,
                   int64_t top_k, const std::string& dtype, const std::string& embedding_dtype,
                   const std::string& device, int64_t threads, const std::string& isa, int64_t sm,
                   int64_t sms, const std::map<std::string, int64_t>& tuning) {
  const resona::Shape s{batch,    queries,         context,       heads,      kv_heads,
                        head_dim, retrieval_heads, retrieval_dim, chunk_size, top_k};
  check(s);
  const resona::DType rows = dtype_named("dtype", dtype);
  const resona::DType embeddings =
      embedding_dtype.empty() ? rows : dtype_named("embedding_dtype", embedding_dtype);
  if (device == "cpu") return cpu_plan(s, rows, embeddings, threads, isa);
  require(device == "cuda", "device", "cpu or cuda", device);
  for (const auto& [argument, type] : {std::pair("dtype", rows), std::pair("embedding_dtype", embeddings)})
    require(type != resona::DType::kFloat64, argument, "float32, float16 or bfloat16 on CUDA", "float64");
  return cuda_plan(s, rows, embeddings, sm, sms, tuning);
}

Stage prefix_stage(const char* name, const resona::CudaPrefixPlan& p) {
  return {name,
          p.kernel,
          p.reason,
          {{"batch", p.batch},
           {"launches", p.launches},
           {"segment", p.segment},
           {"token_pieces", p.token_pieces},
           {"prefix_pieces", p.prefix_pieces},
           {"slices", p.layout.slices},
           {"slice_values", p.layout.slice_values},
           {"vector", p.vector_values},
           {"shared_bytes", p.shared_bytes},
           {"workspace_bytes", p.workspace_bytes}}};
}

void check_prefix(const resona::PrefixShape& s) {
  const auto within = [](const char* argument, int64_t value, int64_t least, int64_t most) {
    require(value >= least && value <= most, argument, std::to_string(least) + " to " + std::to_string(most),
            std::to_string(value));
  };
  within("batch", s.batch, 0, int64_t{1} << 24);
  within("heads", s.heads, 1, int64_t{1} << 24);
  within("tokens", s.tokens, 0, (int64_t{1} << 31) - 1);
  within("prefix_rows", s.prefix_rows, 0, s.tokens);
  within("feature_dim", s.feature_dim, 1, 32);
  within("value_dim", s.value_dim, 1, 128);
  within("sequences", s.sequences, 0, int64_t{1} << 31);
}

// For tensors as torch allocates them; `sequences` of a packed batch, or -1.
PlanView make_prefix_plan(int64_t batch, int64_t tokens, int64_t prefix_rows, int64_t heads,
                          int64_t feature_dim, int64_t value_dim, int64_t sequences, const std::string& dtype,
                          const std::string& device, int64_t sm, int64_t sms) {
  const bool packed = sequences >= 0;
  const resona::PrefixShape s{
      batch, tokens, prefix_rows, heads, feature_dim, value_dim, packed ? sequences : batch};
  check_prefix(s);
  const resona::DType rows = dtype_named("dtype", dtype);
  if (device == "cpu") {
    const resona::PrefixPlan p = resona::plan_prefix(s);
    return {{{"prefix", p.kernel, p.reason, {{"segment", p.segment}}}}, 0};
  }
  require(device == "cuda", "device", "cpu or cuda", device);
  require(rows != resona::DType::kFloat64, "dtype", "float32, float16 or bfloat16 on CUDA", dtype);
  require(sm >= 80, "sm", "at least 80", std::to_string(sm));
  require(sms >= 1 && sms <= 1 << 16, "sms", "1 to 65536", std::to_string(sms));
  const resona::CudaDevice cuda = resona::typical_cuda_device(sm, sms);
  const int64_t piece = 16 / resona::size_of(rows);
  const resona::CudaPrefixFacts facts{packed, feature_dim % piece == 0 && value_dim % piece == 0};
  const resona::CudaPrefixPlan forward = resona::plan_prefix_cuda(s, facts, cuda);
  const resona::CudaPrefixPlan backward = resona::plan_prefix_backward_cuda(s, facts, cuda);
  return {{prefix_stage("prefix", forward), prefix_stage("prefix_backward", backward)},
          forward.workspace_bytes};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Plans and build facts of resona_ext; tensors go through torch.ops.resona.";
  py::class_<Stage>(m, "Stage")
      .def_readonly("name", &Stage::name)
      .def_readonly("kernel", &Stage::kernel)
      .def_readonly("reason", &Stage::reason)
      .def_readonly("parameters", &Stage::parameters);
  py::class_<PlanView>(m, "Plan")
      .def_readonly("stages", &PlanView::stages)
      .def_readonly("workspace_bytes", &PlanView::workspace_bytes);
  m.def("build_info", [] { return resona::build_info({}, ""); }, "Facts of this binary, as JSON.");
  m.def("plan", &make_plan, py::kw_only(), py::arg("batch"), py::arg("queries"), py::arg("context"),
        py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("retrieval_heads"),
        py::arg("retrieval_dim"), py::arg("chunk_size"), py::arg("top_k"), py::arg("dtype") = "float32",
        py::arg("embedding_dtype") = "", py::arg("device") = "cpu", py::arg("threads") = 1,
        py::arg("isa") = "portable", py::arg("sm") = 90, py::arg("sms") = 132,
        py::arg("tuning") = std::map<std::string, int64_t>(),
        "Which kernels a problem would run, with which tiles and why. Raises ValueError if it is not legal.");
  m.def("plan_prefix", &make_prefix_plan, py::kw_only(), py::arg("batch"), py::arg("tokens"),
        py::arg("prefix_rows"), py::arg("heads"), py::arg("feature_dim") = 16, py::arg("value_dim") = 64,
        py::arg("sequences") = -1, py::arg("dtype") = "float32", py::arg("device") = "cpu",
        py::arg("sm") = 90, py::arg("sms") = 132, "The same of prefix linear attention.");
}
