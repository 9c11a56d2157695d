// The inverted index, from the problem on: the plan and index.cu itself (launches.cpp), on arrays from
// Python.
#include "cuda/index.cuh"

#include "cuda/build_index.cuh"
#include "kernels/stage_arguments.h"

namespace {

using namespace resona;
using namespace resona::cuda;

struct Results {
  IndexArrays index;
  int64_t keys, slots;
  uint32_t *offsets, *sorted_slots, *list;
  int32_t* position;
  int64_t* items;
};

// One block: what the lists hold, and each item of the work list as (key, number within the key).
__global__ void copy_results(Results r) {
  ptx::griddepcontrol_wait();
  const IndexArrays& a = r.index;
  for (int64_t i = threadIdx.x; i <= r.keys; i += blockDim.x) r.offsets[i] = a.offsets[i];
  for (int64_t at = threadIdx.x; at < a.offsets[r.keys]; at += blockDim.x) {
    r.sorted_slots[at] = a.sorted_slots[at];
    if (r.list) r.list[at] = a.list[at];
  }
  for (int64_t slot = threadIdx.x; r.position && slot < r.slots; slot += blockDim.x)
    r.position[slot] = a.position[slot];
  const uint32_t items = work_items(a.tile_begin, a.tile_totals, r.keys);
  for (uint32_t tile = threadIdx.x; tile < items; tile += blockDim.x) {
    const WorkItem item = find_work(a.tile_begin, a.tile_totals, r.keys, tile);
    r.items[2 * tile] = item.key;
    r.items[2 * tile + 1] = tile - item.begin;
  }
}

CudaIndexPlan plan_of(const simt::Arguments& a, const Shape& s) {
  const CudaDevice device{a.integer("sms"), 90, 232448};
  const int64_t digit_bits = a.integer("digit_bits");
  if (digit_bits == 0) return plan_index_cuda(s, device);
  CudaIndexPlan plan = plan_index_sort_cuda(s, device);
  const int64_t bits = plan.passes * plan.digit_bits;
  plan.digit_bits = digit_bits < bits ? digit_bits : bits;
  plan.passes = (bits + plan.digit_bits - 1) / plan.digit_bits;
  Workspace counting;
  take_index(plan, counting);
  plan.workspace_bytes = counting.bytes();
  return plan;
}

void run_index(const simt::Arguments& a) {
  IndexProblem p{};
  Shape& s = p.shape;
  s.batch = a.integer("batch"), s.queries = a.integer("queries"), s.context = a.integer("context");
  s.retrieval_heads = a.integer("heads"), s.chunk_size = a.integer("chunk_size");
  s.top_k = a.integer("top_k");
  p.indices = a.array<int32_t>("indices");
  p.packed = {a.optional_array<int32_t>("cu_seqlens"), a.optional_array<int32_t>("chunk_begin"),
              a.integer("sequences")};
  p.rows_per_query = a.integer("rows_per_query"), p.tile_rows = a.integer("tile_rows");
  p.queries_before = a.integer("queries_before"), p.queries_behind = a.integer("queries_behind");
  p.wants_positions = a.optional_array<int32_t>("position") != nullptr;
  p.tile_counts = a.optional_array<uint16_t>("tile_counts");
  const CudaIndexPlan plan = plan_of(a, s);
  if (plan.quick != (a.integer("quick") != 0)) throw std::invalid_argument("index: not the plan expected");
  Workspace workspace(stages::workspace_of(a, plan.workspace_bytes));
  const Results r{build_index(p, plan, workspace, {}),
                  plan.keys,
                  plan.slots,
                  a.array<uint32_t>("offsets"),
                  a.array<uint32_t>("sorted_slots"),
                  a.optional_array<uint32_t>("list"),
                  a.optional_array<int32_t>("position"),
                  a.array<int64_t>("items")};
  simt::launch({"copy_results", 1, 64, 0, true}, [r] { copy_results(r); });
}

const simt::Registration registration("index", run_index);

}  // namespace
