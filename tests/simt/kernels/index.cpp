// The whole of index.cuh, kernel after kernel, on arrays from Python.
#include "cuda/index.cuh"

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

// One thread per item of the work list: (key, number within the key).
__global__ void list_work(const uint32_t* tile_begin, const uint32_t* totals, int64_t keys, int64_t* items) {
  ptx::griddepcontrol_wait();
  const uint32_t count = work_items(tile_begin, totals, keys);
  for (uint32_t tile = threadIdx.x; tile < count; tile += blockDim.x) {
    const WorkItem item = find_work(tile_begin, totals, keys, tile);
    items[2 * tile] = item.key;
    items[2 * tile + 1] = tile - item.begin;
  }
}

void run_index(const simt::Arguments& a) {
  IndexKeysParams k{};
  k.indices = a.array<int32_t>("indices");
  uint32_t* keys[2] = {a.array<uint32_t>("keys_0"), a.array<uint32_t>("keys_1")};
  uint32_t* slots[2] = {a.array<uint32_t>("slots_0"), a.array<uint32_t>("slots_1")};
  k.keys = keys[0];
  k.batch = a.integer("batch");
  k.queries = a.integer("queries");
  k.heads = a.integer("heads");
  k.top_k = a.integer("top_k");
  k.context = a.integer("context");
  k.chunk_size = a.integer("chunk_size");
  k.chunks_per_batch = k.context / k.chunk_size;
  k.packed.cu_seqlens = a.optional_array<int32_t>("cu_seqlens");
  k.packed.chunk_begin = a.optional_array<int32_t>("chunk_begin");
  k.packed.count = a.integer("sequences");
  const int64_t count = k.batch * k.queries * k.heads * k.top_k,
                unused = k.batch * k.heads * k.chunks_per_batch;
  simt::launch({"index_keys_kernel", blocks_for(count, IndexConfig::kThreads, 3), IndexConfig::kThreads},
               [k] { index_keys_kernel(k); });

  int bits = 1;
  while (unused >> bits) ++bits;
  const int digit_bits = static_cast<int>(a.integer("digit_bits")),
            passes = (bits + digit_bits - 1) / digit_bits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit_bits, left = bits - shift, from = pass % 2;
    launch_pass({keys[from], pass ? slots[from] : nullptr, keys[1 - from], slots[1 - from],
                 a.array<uint32_t>("counts"), a.array<uint32_t>("totals"), count,
                 (count + IndexConfig::kTile - 1) / IndexConfig::kTile, shift,
                 left < digit_bits ? left : digit_bits});
  }

  const int last = passes % 2;
  const IndexResultParams r{keys[last],
                            slots[last],
                            a.array<uint32_t>("list"),
                            a.array<int32_t>("position"),
                            a.array<uint32_t>("offsets"),
                            a.array<uint32_t>("tile_begin"),
                            count,
                            k.heads * k.top_k,
                            unused,
                            a.integer("rows_per_query"),
                            a.integer("tile_rows")};
  simt::launch(
      {"index_lists_kernel", blocks_for(count, IndexConfig::kThreads, 3), IndexConfig::kThreads, 0, true},
      [r] { index_lists_kernel(r); });
  simt::launch({"index_offsets_kernel", blocks_for(unused + 1, IndexConfig::kThreads, 3),
                IndexConfig::kThreads, 0, true},
               [r] { index_offsets_kernel(r); });
  uint32_t* tile_totals = a.array<uint32_t>("tile_totals");
  launch_scan(r.tile_begin, tile_totals, unused + 1);
  int64_t* items = a.array<int64_t>("items");
  simt::launch({"list_work", 1, 64, 0, true}, [=] { list_work(r.tile_begin, tile_totals, unused, items); });
}

const simt::Registration registration("index", run_index);

}  // namespace
