// The whole of retrieve_backward.cuh, index build included, on arrays from Python.
#include "cuda/retrieve_backward.cuh"

#include "runtime/arguments.h"

namespace {

using namespace resona::cuda;

dim3 blocks_for(int64_t items, int64_t per_block, int64_t most = 1 << 20) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < 1 ? 1 : blocks > most ? most : blocks));
}

void launch_scan(uint32_t* entries, uint32_t* totals, int64_t count) {
  const ScanParams p{entries, totals, count};
  simt::launch({"scan_tiles_kernel", blocks_for(count, ScanConfig::kTile), ScanConfig::kThreads, 0, true},
               [p] { scan_tiles_kernel(p); });
  simt::launch({"scan_totals_kernel", 1, ScanConfig::kThreads, 0, true}, [p] { scan_totals_kernel(p); });
}

void launch_pass(const IndexPassParams& p) {
  const dim3 blocks(static_cast<unsigned>(p.tiles));
  simt::launch({"index_count_kernel", blocks, IndexConfig::kThreads, 0, true},
               [p] { index_count_kernel(p); });
  launch_scan(p.counts, p.totals, p.tiles << p.bits);
  simt::launch({"index_scatter_kernel", blocks, IndexConfig::kThreads, 0, true},
               [p] { index_scatter_kernel(p); });
}

// The lists of the chunks as far as the gradient needs them: no index_lists_kernel.
template <class T>
void build_lists(const simt::Arguments& a, RetrieveBackwardParams<T>& p) {
  uint32_t* keys[2] = {a.array<uint32_t>("keys_0"), a.array<uint32_t>("keys_1")};
  uint32_t* slots[2] = {a.array<uint32_t>("slots_0"), a.array<uint32_t>("slots_1")};
  IndexKeysParams k{};
  k.indices = p.indices;
  k.keys = keys[0];
  k.batch = p.batch;
  k.queries = p.queries;
  k.heads = p.heads;
  k.top_k = p.top_k;
  k.context = p.context;
  k.chunk_size = p.chunk_size;
  k.chunks_per_batch = p.chunks_per_batch;
  k.packed = p.packed;
  const int64_t count = p.rows() * p.top_k, unused = p.keys();
  simt::launch(
      {"index_keys_kernel", blocks_for(count, IndexConfig::kThreads, 3), IndexConfig::kThreads, 0, true},
      [k] { index_keys_kernel(k); });

  int bits = 1, passes = 0;
  while (unused >> bits) ++bits;
  for (int shift = 0; shift < bits; shift += IndexConfig::kDigitBits, ++passes) {
    const int left = bits - shift, from = passes % 2;
    launch_pass({keys[from], passes ? slots[from] : nullptr, keys[1 - from], slots[1 - from],
                 a.array<uint32_t>("counts"), a.array<uint32_t>("totals"), count,
                 (count + IndexConfig::kTile - 1) / IndexConfig::kTile, shift,
                 left < IndexConfig::kDigitBits ? left : IndexConfig::kDigitBits});
  }

  const int last = passes % 2;
  IndexResultParams r{};
  r.keys = keys[last];
  r.offsets = a.array<uint32_t>("offsets");
  r.tile_begin = a.array<uint32_t>("tile_begin");
  r.count = count;
  r.unused_key = unused;
  r.rows_per_query = 1;
  r.tile_rows = p.segment;
  simt::launch({"index_offsets_kernel", blocks_for(unused + 1, IndexConfig::kThreads, 3),
                IndexConfig::kThreads, 0, true},
               [r] { index_offsets_kernel(r); });
  uint32_t* tile_totals = a.array<uint32_t>("tile_totals");
  launch_scan(r.tile_begin, tile_totals, unused + 1);
  p.slots = slots[last];
  p.offsets = r.offsets;
  p.tile_begin = r.tile_begin;
  p.tile_totals = tile_totals;
}

template <class T>
RetrieveBackwardParams<T> params_of(const simt::Arguments& a) {
  RetrieveBackwardParams<T> p{};
  p.query = a.array<T>("query");
  p.query_batch_stride = a.integer("query_batch_stride");
  p.query_token_stride = a.integer("query_token_stride");
  p.query_head_stride = a.integer("query_head_stride");
  p.chunks = a.array<T>("chunks");
  p.chunk_batch_stride = a.integer("chunk_batch_stride");
  p.chunk_row_stride = a.integer("chunk_row_stride");
  p.chunk_head_stride = a.integer("chunk_head_stride");
  p.indices = a.array<int32_t>("indices");
  p.score_gradient = a.array<float>("score_gradient");
  p.query_gradient = a.array<T>("query_gradient");
  p.chunk_gradient = a.array<T>("chunk_gradient");
  p.batch = a.integer("batch");
  p.queries = a.integer("queries");
  p.heads = a.integer("heads");
  p.top_k = a.integer("top_k");
  p.context = a.integer("context");
  p.chunk_size = a.integer("chunk_size");
  p.dim = a.integer("dim");
  p.chunks_per_batch = p.context / p.chunk_size;
  p.packed.cu_seqlens = a.optional_array<int32_t>("cu_seqlens");
  p.lanes = static_cast<int>(a.integer("lanes"));
  p.vector = a.integer("vector") != 0;
  p.factors = a.array<float>("factors");
  p.partials = a.array<float>("partials");
  p.segment = a.integer("segment");
  return p;
}

template <class T>
void run_retrieve_backward_of(const simt::Arguments& a) {
  RetrieveBackwardParams<T> p = params_of<T>(a);
  if (p.packed.cu_seqlens) {
    int32_t* chunk_begin = a.array<int32_t>("chunk_begin");
    p.packed.count = a.integer("sequences");
    p.packed.chunk_begin = chunk_begin;
    const ChunkOffsetsParams offsets{p.packed.cu_seqlens, chunk_begin, p.packed.count, p.context,
                                     p.chunk_size};
    simt::launch({"chunk_offsets_kernel", dim3(1), dim3(ChunkOffsetsConfig::kThreads)},
                 [offsets] { chunk_offsets_kernel(offsets); });
  }
  const dim3 blocks(static_cast<unsigned>(a.integer("blocks")));
  constexpr int kThreads = RetrieveBackwardConfig::kThreads;
  simt::launch({"retrieve_query_gradient_kernel", blocks, kThreads, 0, p.packed.cu_seqlens != nullptr},
               [p] { retrieve_query_gradient_kernel(p); });
  build_lists(a, p);
  simt::launch({"retrieve_chunk_segments_kernel", blocks, kThreads, 0, true},
               [p] { retrieve_chunk_segments_kernel(p); });
  simt::launch({"retrieve_chunk_gradient_kernel", blocks, kThreads, 0, true},
               [p] { retrieve_chunk_gradient_kernel(p); });
}

void run_retrieve_backward(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  if (dtype == "float32") return run_retrieve_backward_of<float>(a);
  if (dtype == "float16") return run_retrieve_backward_of<Half>(a);
  run_retrieve_backward_of<BFloat16>(a);
}

const simt::Registration registration("retrieve_backward", run_retrieve_backward);

}  // namespace
