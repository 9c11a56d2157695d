#include "ops/checks.h"

#include <atomic>
#include <cmath>
#include <stdexcept>

#include "common/canonical.h"
#include "ops/checker.h"
#include "ops/executor.h"

namespace resona::ops {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxContext = (int64_t{1} << 31) - 1;

std::vector<Sequence> batch_sequences(const Shape& s) {
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < s.batch; ++b) sequences.push_back({b, 0, s.queries, 0, s.context, 0});
  return sequences;
}

std::vector<Sequence> packed_sequences(const Checker& check, const Tensor& cu_seqlens, const Shape& s) {
  const Tensor borders = on_host(cu_seqlens);
  const int32_t* border = static_cast<const int32_t*>(borders.const_data_ptr());
  const int64_t count = borders.size(0) - 1;
  check.require(border[0] == 0, "cu_seqlens", "a first value of 0", std::to_string(border[0]));
  check.require(border[count] == s.context, "cu_seqlens", "a last value of L = " + std::to_string(s.context),
                std::to_string(border[count]));
  std::vector<Sequence> sequences;
  int64_t chunk_begin = 0;
  for (int64_t i = 0; i < count; ++i) {
    check.require(border[i] <= border[i + 1], "cu_seqlens", "values that never decrease",
                  std::to_string(border[i]) + " before " + std::to_string(border[i + 1]));
    const int64_t length = border[i + 1] - border[i];
    sequences.push_back({0, border[i], length, border[i], length, chunk_begin});
    chunk_begin += length / s.chunk_size;
  }
  return sequences;
}

Checked check_sequences(const Checker& check, const OptionalTensor& cu_seqlens, const Shape& s,
                        const Tensor& like, const char* like_name) {
  Checked checked;
  checked.shape = s;
  if (!cu_seqlens.has_value()) {
    checked.has_values = looks_at_values(check.op, like);
    if (checked.has_values) checked.sequences = batch_sequences(s);
    return checked;
  }
  check.rank("cu_seqlens", *cu_seqlens, 1, "[n + 1]");
  check.exactly("cu_seqlens", *cu_seqlens, ScalarType::Int);
  check.device("cu_seqlens", *cu_seqlens, like, like_name);
  check.require(cu_seqlens->size(0) >= 1, "cu_seqlens", "at least one value", "none");
  check.require(s.batch == 1, "cu_seqlens", "B = 1 for packed sequences", "B = " + std::to_string(s.batch));
  check.require(s.queries == s.context, "cu_seqlens",
                "T = L = " + std::to_string(s.context) + " for packed sequences",
                "T = " + std::to_string(s.queries));
  checked.has_values = looks_at_values(check.op, like);
  if (checked.has_values) checked.sequences = packed_sequences(check, *cu_seqlens, s);
  checked.cu_seqlens = as_contiguous(*cu_seqlens);
  return checked;
}

void check_lengths(const Checker& check, const char* argument, const Shape& s) {
  check.require(s.context <= kMaxContext, argument, "L < 2^31", "L = " + std::to_string(s.context));
  check.require(s.queries <= s.context, argument, "T <= L = " + std::to_string(s.context),
                "T = " + std::to_string(s.queries));
}

Shape check_query_key_value(const Checker& check, const AttendArguments& a) {
  check.rank("query", a.query, 4, "[B, T, H, D]");
  check.floating("query", a.query);
  check.runs_on("query", a.query);
  check.rank("key", a.key, 4, "[B, L, Hkv, D]");
  check.dtype("key", a.key, a.query.scalar_type(), "query");
  check.device("key", a.key, a.query, "query");
  check.size("key", a.key, 0, "B", a.query.size(0), "query");
  check.size("key", a.key, 3, "D", a.query.size(3), "query");
  Shape s{};
  s.batch = a.query.size(0), s.queries = a.query.size(1), s.heads = a.query.size(2);
  s.head_dim = a.query.size(3), s.context = a.key.size(1), s.kv_heads = a.key.size(2);
  s.chunk_size = a.chunk_size, s.retrieval_heads = s.retrieval_dim = s.top_k = 1;
  check.require(s.head_dim >= 1 && s.head_dim <= kMaxHeadDim, "query", "head dim D from 1 to 256",
                "D = " + std::to_string(s.head_dim));
  check.shape("value", a.value, "[B, L, Hkv, D]", {s.batch, s.context, s.kv_heads, s.head_dim});
  check.dtype("value", a.value, a.query.scalar_type(), "query");
  check.device("value", a.value, a.query, "query");
  check.require(s.kv_heads >= 1, "key", "Hkv of at least 1", "Hkv = 0");
  check.require(s.heads >= 1 && s.heads % s.kv_heads == 0, "query",
                "H a multiple of Hkv = " + std::to_string(s.kv_heads), "H = " + std::to_string(s.heads));
  check_lengths(check, "query", s);
  check.at_least_one("chunk_size", a.chunk_size);
  return s;
}

void check_retrieval_heads(const Checker& check, const char* argument, const Shape& s) {
  const int64_t r = s.retrieval_heads;
  check.require(r >= 1 && s.kv_heads % r == 0, argument,
                "R = 1 or a divisor of Hkv = " + std::to_string(s.kv_heads), "R = " + std::to_string(r));
}

void check_sink_and_scale(const Checker& check, const AttendArguments& a, const Shape& s) {
  if (a.sink.has_value()) {
    check.shape("sink", *a.sink, "[H]", {s.heads});
    check.exactly("sink", *a.sink, accumulation_type(a.query));
    check.device("sink", *a.sink, a.query, "query");
  }
  if (a.scale.has_value())
    check.require(std::isfinite(*a.scale), "scale", "a finite number",
                  std::isnan(*a.scale) ? "nan" : (*a.scale > 0 ? "inf" : "-inf"));
}

void check_capacity(const Checker& check, const Tensor& lengths, int64_t capacity) {
  const Tensor held = on_host(lengths);
  const int32_t* length = static_cast<const int32_t*>(held.const_data_ptr());
  for (int64_t b = 0; b < held.size(0); ++b)
    check.require(length[b] >= 0 && length[b] < capacity, "lengths",
                  "0 to M - 1 = " + std::to_string(capacity - 1) + ", room for one more token",
                  std::to_string(length[b]) + " at " + text_of({b}));
}

}  // namespace

void fail(const char* op, const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::runtime_error("resona::" + std::string(op) + ": " + argument + ": expected " + expected +
                           ", got " + got);
}

void check_exact(const char* op, const char* argument, const Tensor& t, const char* layout,
                 const std::vector<int64_t>& shape, ScalarType type, const Tensor& like,
                 const char* like_name) {
  const Checker check{op};
  check.shape(argument, t, layout, shape);
  check.exactly(argument, t, type);
  check.device(argument, t, like, like_name);
}

// Rows are scanned in parallel; the first bad slot in memory order is reported.
void check_index_values(const char* op, const Checked& checked, const Tensor& indices) {
  if (!checked.has_values) return;
  const Shape& s = checked.shape;
  const Tensor held = on_host(indices);
  const int32_t* index = static_cast<const int32_t*>(held.const_data_ptr());
  const int64_t slots = s.retrieval_heads * s.top_k;
  std::atomic<int64_t> first_bad{INT64_MAX};
  struct Block {
    const Sequence* sequence;
    int64_t begin, end;
  };
  std::vector<Block> blocks;
  for (const Sequence& q : checked.sequences)
    for (int64_t begin = 0; begin < q.query_count; begin += 4096)
      blocks.push_back({&q, q.query_begin + begin, q.query_begin + std::min(begin + 4096, q.query_count)});
  cpu::for_each_task(
      TorchExecutor(), static_cast<int64_t>(blocks.size()), [] { return 0; },
      [&](int, int64_t b) {
        const Block& block = blocks[b];
        for (int64_t row = block.begin; row < block.end; ++row) {
          const int64_t eligible = canonical::eligible_chunks(block.sequence->position(row), s.chunk_size);
          const int64_t at = (block.sequence->batch * s.queries + row) * slots;
          for (int64_t i = at; i < at + slots; ++i) {
            if (index[i] >= -1 && index[i] < eligible) continue;
            int64_t seen = first_bad.load();
            while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
            }
          }
        }
      });
  const int64_t bad = first_bad.load();
  if (bad == INT64_MAX) return;
  const int64_t slot = bad % s.top_k, r = bad / s.top_k % s.retrieval_heads, row = bad / slots;
  fail(op, "indices", "-1 or a chunk that lies wholly before its query",
       std::to_string(index[bad]) + " at " + text_of({row / s.queries, row % s.queries, r, slot}));
}

Checked check_pool_chunks(const char* op, const Tensor& context_embedding, int64_t chunk_size,
                          const OptionalTensor& cu_seqlens) {
  const Checker check{op};
  const Tensor& context = context_embedding;
  check.rank("context_embedding", context, 4, "[B, L, R, E]");
  check.floating("context_embedding", context);
  check.runs_on("context_embedding", context);
  const Shape s{context.size(0), context.size(1), context.size(1), 1, 1, 1,
                context.size(2), context.size(3), chunk_size,      1};
  check.at_least_one("chunk_size", chunk_size);
  check.require(s.retrieval_dim >= 1, "context_embedding", "retrieval dim E of at least 1", "E = 0");
  check_lengths(check, "context_embedding", s);
  return check_sequences(check, cu_seqlens, s, context, "context_embedding");
}

Checked check_retrieve(const char* op, const Tensor& query_embedding, const Tensor& chunk_embedding,
                       int64_t chunk_size, int64_t top_k, int64_t context_length,
                       const OptionalTensor& cu_seqlens) {
  const Checker check{op};
  const Tensor& query = query_embedding;
  check.rank("query_embedding", query, 4, "[B, T, R, E]");
  check.floating("query_embedding", query);
  check.runs_on("query_embedding", query);
  const Shape s{query.size(0), query.size(1), context_length, 1,    1, 1,
                query.size(2), query.size(3), chunk_size,     top_k};
  check.require(s.retrieval_dim >= 1, "query_embedding", "retrieval dim E of at least 1", "E = 0");
  check.require(s.retrieval_heads >= 1, "query_embedding", "R of at least 1", "R = 0");
  check.at_least_one("chunk_size", chunk_size);
  check.at_least_one("top_k", top_k);
  check_lengths(check, "query_embedding", s);
  check.shape("chunk_embedding", chunk_embedding, "[B, L // S, R, E]",
              {s.batch, context_length / chunk_size, s.retrieval_heads, s.retrieval_dim});
  check.dtype("chunk_embedding", chunk_embedding, query.scalar_type(), "query_embedding");
  check.device("chunk_embedding", chunk_embedding, query, "query_embedding");
  return check_sequences(check, cu_seqlens, s, query, "query_embedding");
}

Checked check_attend(const char* op, const AttendArguments& a, const Tensor& indices,
                     const OptionalTensor& bias) {
  const Checker check{op};
  Shape s = check_query_key_value(check, a);
  check.rank("indices", indices, 4, "[B, T, R, k]");
  check.exactly("indices", indices, ScalarType::Int);
  check.device("indices", indices, a.query, "query");
  check.size("indices", indices, 0, "B", s.batch, "query");
  check.size("indices", indices, 1, "T", s.queries, "query");
  s.retrieval_heads = indices.size(2), s.top_k = indices.size(3);
  check_retrieval_heads(check, "indices", s);
  check.require(s.top_k >= 1, "indices", "k of at least 1", "k = 0");
  if (bias.has_value()) {
    check.shape("bias", *bias, "[B, T, R, k]", {s.batch, s.queries, s.retrieval_heads, s.top_k});
    check.exactly("bias", *bias, accumulation_type(a.query));
    check.device("bias", *bias, a.query, "query");
  }
  check_sink_and_scale(check, a, s);
  const Checked checked = check_sequences(check, a.cu_seqlens, s, a.query, "query");
  check_index_values(op, checked, indices);
  return checked;
}

Checked check_fused(const char* op, const AttendArguments& a, const Tensor& query_embedding,
                    const Tensor& context_embedding, int64_t top_k, const OptionalTensor& score_scale) {
  const Checker check{op};
  Shape s = check_query_key_value(check, a);
  check.rank("query_embedding", query_embedding, 4, "[B, T, R, E]");
  check.floating("query_embedding", query_embedding);
  check.device("query_embedding", query_embedding, a.query, "query");
  check.size("query_embedding", query_embedding, 0, "B", s.batch, "query");
  check.size("query_embedding", query_embedding, 1, "T", s.queries, "query");
  s.retrieval_heads = query_embedding.size(2), s.retrieval_dim = query_embedding.size(3), s.top_k = top_k;
  check_retrieval_heads(check, "query_embedding", s);
  check.require(s.retrieval_dim >= 1, "query_embedding", "retrieval dim E of at least 1", "E = 0");
  check.shape("context_embedding", context_embedding, "[B, L, R, E]",
              {s.batch, s.context, s.retrieval_heads, s.retrieval_dim});
  check.dtype("context_embedding", context_embedding, query_embedding.scalar_type(), "query_embedding");
  check.device("context_embedding", context_embedding, a.query, "query");
  check.at_least_one("top_k", top_k);
  if (score_scale.has_value()) {
    check.shape("score_scale", *score_scale, "[R]", {s.retrieval_heads});
    check.exactly("score_scale", *score_scale, accumulation_type(a.query));
    check.device("score_scale", *score_scale, a.query, "query");
  }
  check_sink_and_scale(check, a, s);
  return check_sequences(check, a.cu_seqlens, s, a.query, "query");
}

Shape check_decode(const char* op, const AttendArguments& a, const Tensor& query_embedding,
                   const Tensor& context_embedding, int64_t top_k, const OptionalTensor& score_scale,
                   const DecodeCache& cache) {
  const Checker check{op};
  const Checked checked = check_fused(op, a, query_embedding, context_embedding, top_k, score_scale);
  Shape s = checked.shape;
  check.require(s.queries == 1, "query", "T = 1, one new token per sequence", "shape " + shape_of(a.query));
  check.require(s.context == 1, "key", "L = 1, one new token per sequence", "shape " + shape_of(a.key));

  check.rank("key_cache", cache.key_cache, 4, "[B, M, Hkv, D]");
  s.context = cache.key_cache.size(1);
  check_lengths(check, "key_cache", s);
  check.shape("key_cache", cache.key_cache, "[B, M, Hkv, D]", {s.batch, s.context, s.kv_heads, s.head_dim});
  check.shape("value_cache", cache.value_cache, "[B, M, Hkv, D]",
              {s.batch, s.context, s.kv_heads, s.head_dim});
  check.shape("chunk_embedding", cache.chunk_embedding, "[B, M // S, R, E]",
              {s.batch, s.context / s.chunk_size, s.retrieval_heads, s.retrieval_dim});
  check.shape("open_sum", cache.open_sum, "[B, R, E]", {s.batch, s.retrieval_heads, s.retrieval_dim});
  check.rank("history", cache.history, 4, "[B, W, R, E]");
  check.shape("history", cache.history, "[B, W, R, E]",
              {s.batch, cache.history.size(1), s.retrieval_heads, s.retrieval_dim});
  check.shape("lengths", cache.lengths, "[B]", {s.batch});

  check.dtype("key_cache", cache.key_cache, a.query.scalar_type(), "query");
  check.dtype("value_cache", cache.value_cache, a.query.scalar_type(), "query");
  check.dtype("chunk_embedding", cache.chunk_embedding, query_embedding.scalar_type(), "query_embedding");
  check.exactly("open_sum", cache.open_sum, accumulation_type(query_embedding));
  check.dtype("history", cache.history, query_embedding.scalar_type(), "query_embedding");
  check.exactly("lengths", cache.lengths, ScalarType::Int);

  check.in_place("key_cache", cache.key_cache, a.query);
  check.in_place("value_cache", cache.value_cache, a.query);
  check.in_place("chunk_embedding", cache.chunk_embedding, a.query);
  check.in_place("open_sum", cache.open_sum, a.query);
  check.in_place("history", cache.history, a.query);
  check.in_place("lengths", cache.lengths, a.query);
  if (checked.has_values) check_capacity(check, cache.lengths, s.context);
  return s;
}

void check_superchunks(const char* op, const Shape& s, const Tensor& query, const Tensor& query_embedding,
                       const DecodeSuperchunks& superchunks) {
  const Checker check{op};
  const Tensor &embedding = superchunks.superchunk_embedding, &sum = superchunks.superchunk_sum;
  check.at_least_one("superchunk_size", superchunks.superchunk_size);
  if (superchunks.probes.has_value()) check.at_least_one("probes", *superchunks.probes);
  const int64_t count = s.context / s.chunk_size / superchunks.superchunk_size;
  check.shape("superchunk_embedding", embedding, "[B, M // S // P, R, E]",
              {s.batch, count, s.retrieval_heads, s.retrieval_dim});
  check.shape("superchunk_sum", sum, "[B, R, E]", {s.batch, s.retrieval_heads, s.retrieval_dim});
  check.dtype("superchunk_embedding", embedding, query_embedding.scalar_type(), "query_embedding");
  check.exactly("superchunk_sum", sum, accumulation_type(query_embedding));
  check.in_place("superchunk_embedding", embedding, query);
  check.in_place("superchunk_sum", sum, query);
}

}  // namespace resona::ops
