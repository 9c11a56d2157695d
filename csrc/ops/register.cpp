// Schemas of torch.ops.resona.* and their kernels. Every Tensor argument stands before `*`, or torch
// could not register autograd and vmap. Names with an underscore are ours to change.
#include <torch/csrc/stable/library.h>

#include "common/build_info.h"
#include "common/plan_two_level.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/stage_clock.h"
#include "ops/checker.h"
#include "ops/ops.h"
#include "ops/tuning.h"

namespace {

std::string build_info() {
  return resona::build_info(resona::cpu::runnable_instruction_sets(), resona::cpu::kernel_set().name);
}

// superchunk_size, probes
std::tuple<int64_t, int64_t> plan_two_level(int64_t context_length, int64_t chunk_size, int64_t top_k,
                                            std::optional<int64_t> superchunk_size,
                                            std::optional<int64_t> probes) {
  const resona::ops::Checker check{"_plan_two_level"};
  check.require(context_length >= 0, "context_length", "at least 0", std::to_string(context_length));
  check.at_least_one("chunk_size", chunk_size);
  if (superchunk_size.has_value()) check.at_least_one("superchunk_size", *superchunk_size);
  if (probes.has_value()) check.at_least_one("probes", *probes);
  resona::Shape s{};
  s.context = context_length, s.chunk_size = chunk_size, s.top_k = top_k;
  const resona::TwoLevelPlan plan = resona::plan_two_level(s, superchunk_size, probes);
  return {plan.superchunk_size, plan.probes};
}

// The operators look at their tensors to find where to run.
template <class Library>
void implement(Library& m) {
  m.impl("pool_chunks", TORCH_BOX(&resona::ops::pool_chunks));
  m.impl("retrieve", TORCH_BOX(&resona::ops::retrieve));
  m.impl("retrieve_two_level", TORCH_BOX(&resona::ops::retrieve_two_level));
  m.impl("attend", TORCH_BOX(&resona::ops::attend));
  m.impl("fused_retrieve_attend", TORCH_BOX(&resona::ops::fused_retrieve_attend));
  m.impl("decode_step", TORCH_BOX(&resona::ops::decode_step));
  m.impl("decode_step_two_level", TORCH_BOX(&resona::ops::decode_step_two_level));
  m.impl("prefix_linear_attention", TORCH_BOX(&resona::ops::prefix_linear_attention));
  m.impl("prefix_linear_attention_step", TORCH_BOX(&resona::ops::prefix_linear_attention_step));
  m.impl("_prefix_linear_attention_backward", TORCH_BOX(&resona::ops::prefix_linear_attention_backward));
  m.impl("_pool_chunks_backward", TORCH_BOX(&resona::ops::pool_chunks_backward));
  m.impl("_retrieve_backward", TORCH_BOX(&resona::ops::retrieve_backward));
  m.impl("_attend_backward", TORCH_BOX(&resona::ops::attend_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY(resona, m) {
  // [B, L, R, E] -> [B, L // S, R, E], unit norm
  m.def("pool_chunks(Tensor context_embedding, SymInt chunk_size, Tensor? cu_seqlens=None) -> Tensor");
  // -> indices int32, scores, both [B, T, R, k]
  m.def(
      "retrieve(Tensor query_embedding, Tensor chunk_embedding, SymInt chunk_size, SymInt top_k, "
      "SymInt context_length, Tensor? cu_seqlens=None) -> (Tensor indices, Tensor scores)");
  // The same among the chunks of the `probes` best superchunks of each query, and the one still open there
  m.def(
      "retrieve_two_level(Tensor query_embedding, Tensor chunk_embedding, SymInt chunk_size, SymInt top_k, "
      "SymInt context_length, Tensor? cu_seqlens=None, *, SymInt? superchunk_size=None, "
      "SymInt? probes=None) -> (Tensor indices, Tensor scores)");
  // -> out [B, T, H, D], lse [B, T, H]
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor indices, SymInt chunk_size, Tensor? bias=None, "
      "Tensor? sink=None, Tensor? cu_seqlens=None, *, float? scale=None, bool deterministic=False) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "fused_retrieve_attend(Tensor query, Tensor key, Tensor value, Tensor query_embedding, "
      "Tensor context_embedding, SymInt chunk_size, SymInt top_k, Tensor? score_scale=None, "
      "Tensor? sink=None, Tensor? cu_seqlens=None, *, float? scale=None, bool deterministic=False) "
      "-> (Tensor out, Tensor lse, Tensor indices, Tensor scores)");

  // One new token per sequence, appended in place; raw: no autograd, vmap or autocast
  m.def(
      "decode_step(Tensor query, Tensor key, Tensor value, Tensor query_embedding, Tensor context_embedding, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) chunk_embedding, Tensor(d!) open_sum, "
      "Tensor(e!) history, Tensor(f!) lengths, SymInt chunk_size, SymInt top_k, Tensor? score_scale=None, "
      "Tensor? sink=None, *, float? scale=None) "
      "-> (Tensor out, Tensor lse, Tensor indices, Tensor scores)");
  // The same, searched as retrieve_two_level does, which appends to superchunks [B, M // S // P, R, E] too
  m.def(
      "decode_step_two_level(Tensor query, Tensor key, Tensor value, Tensor query_embedding, "
      "Tensor context_embedding, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) chunk_embedding, "
      "Tensor(d!) open_sum, Tensor(e!) history, Tensor(f!) lengths, Tensor(g!) superchunk_embedding, "
      "Tensor(h!) superchunk_sum, SymInt chunk_size, SymInt top_k, SymInt superchunk_size, "
      "Tensor? score_scale=None, Tensor? sink=None, *, SymInt? probes=None, float? scale=None) "
      "-> (Tensor out, Tensor lse, Tensor indices, Tensor scores)");

  // -> out [B, T, H, V], state [n, H, F, V], normalizer [n, H, F]; F = 1 + f + f^2, n = B or packed sequences
  m.def(
      "prefix_linear_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor "
      "prefix_value, "
      "Tensor? prefix_lengths=None, Tensor? mask=None, Tensor? cu_seqlens=None, Tensor? initial_state=None, "
      "Tensor? initial_normalizer=None, *, float? scale=None) "
      "-> (Tensor out, Tensor state, Tensor normalizer)");
  // One new token per sequence; raw, as decode_step
  m.def(
      "prefix_linear_attention_step(Tensor query, Tensor key, Tensor value, Tensor(a!) state, "
      "Tensor(b!) normalizer, Tensor? mask=None, *, float? scale=None) -> Tensor");
  // the last two have no elements where there is no initial state
  m.def(
      "_prefix_linear_attention_backward(Tensor out_gradient, Tensor? state_gradient, "
      "Tensor? normalizer_gradient, Tensor out, Tensor query, Tensor key, Tensor value, Tensor prefix_key, "
      "Tensor prefix_value, Tensor? prefix_lengths=None, Tensor? mask=None, Tensor? cu_seqlens=None, "
      "Tensor? initial_state=None, Tensor? initial_normalizer=None, *, float? scale=None) "
      "-> (Tensor query_gradient, Tensor key_gradient, Tensor value_gradient, Tensor prefix_key_gradient, "
      "Tensor prefix_value_gradient, Tensor initial_state_gradient, Tensor initial_normalizer_gradient)");

  m.def(
      "_pool_chunks_backward(Tensor chunk_gradient, Tensor context_embedding, SymInt chunk_size, "
      "Tensor? cu_seqlens=None) -> Tensor");
  m.def(
      "_retrieve_backward(Tensor score_gradient, Tensor indices, Tensor query_embedding, "
      "Tensor chunk_embedding, SymInt chunk_size, SymInt context_length, Tensor? cu_seqlens=None) "
      "-> (Tensor query_gradient, Tensor chunk_gradient)");
  // bias_gradient and sink_gradient have no elements where there is no bias or sink
  m.def(
      "_attend_backward(Tensor out_gradient, Tensor? lse_gradient, Tensor query, Tensor key, Tensor value, "
      "Tensor indices, Tensor out, Tensor lse, SymInt chunk_size, Tensor? bias=None, Tensor? sink=None, "
      "Tensor? cu_seqlens=None, *, float? scale=None, bool deterministic=False) "
      "-> (Tensor query_gradient, Tensor key_gradient, Tensor value_gradient, Tensor bias_gradient, "
      "Tensor sink_gradient)");
  m.def("_build_info() -> str");
  // What CUDA plans weigh kernels with (common/cuda_tuning.h), for sweeps; returns the value before
  m.def("_tune_cuda(str name, int value) -> int");
  // JSON: seconds by stage on the CPU since the last call; for benchmarks
  m.def("_cpu_stage_times(bool go_on) -> str");
  m.def(
      "_plan_two_level(int context_length, int chunk_size, int top_k, int? superchunk_size=None, "
      "int? probes=None) -> (int superchunk_size, int probes)");
}

STABLE_TORCH_LIBRARY_IMPL(resona, CPU, m) { implement(m); }

// In every build: one without CUDA kernels says so.
STABLE_TORCH_LIBRARY_IMPL(resona, CUDA, m) { implement(m); }

STABLE_TORCH_LIBRARY_IMPL(resona, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&build_info));
  m.impl("_tune_cuda", TORCH_BOX(&resona::ops::tune_cuda));
  m.impl("_cpu_stage_times", TORCH_BOX(&resona::cpu::read_stage_clock));
  m.impl("_plan_two_level", TORCH_BOX(&plan_two_level));
}
