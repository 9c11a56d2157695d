// The chunk-stationary attention from the selection to the result: index, attend, merge, range after range.
#include "cuda/attend_chunk.cuh"

#include "cuda/attend_merge.cuh"
#include "kernels/attend_arguments.h"
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

// ---- index

template <class T>
void build_index(const simt::Arguments& a, const AttendParams<T>& problem, int64_t before, int64_t behind,
                 const IndexResultParams& result) {
  uint32_t* keys[2] = {a.array<uint32_t>("keys_0"), a.array<uint32_t>("keys_1")};
  uint32_t* slots[2] = {a.array<uint32_t>("slots_0"), a.array<uint32_t>("slots_1")};
  const IndexKeysParams k{problem.indices,         keys[0],        problem.batch,   problem.queries,
                          problem.retrieval_heads, problem.top_k,  problem.context, problem.chunk_size,
                          problem.chunks,          problem.packed, before,          behind};
  const int64_t count = result.count, tiles = (count + IndexConfig::kTile - 1) / IndexConfig::kTile;
  simt::launch(
      {"index_keys_kernel", blocks_for(count, IndexConfig::kThreads, 3), IndexConfig::kThreads, 0, true},
      [k] { index_keys_kernel(k); });
  int bits = 1;
  while (result.unused_key >> bits) ++bits;
  const int passes = (bits + IndexConfig::kDigitBits - 1) / IndexConfig::kDigitBits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * IndexConfig::kDigitBits, left = bits - shift, from = pass % 2;
    const IndexPassParams p{keys[from],
                            pass ? slots[from] : nullptr,
                            keys[1 - from],
                            slots[1 - from],
                            a.array<uint32_t>("counts"),
                            a.array<uint32_t>("totals"),
                            count,
                            tiles,
                            shift,
                            left < IndexConfig::kDigitBits ? left : IndexConfig::kDigitBits};
    const dim3 blocks(static_cast<unsigned>(tiles));
    simt::launch({"index_count_kernel", blocks, IndexConfig::kThreads, 0, true},
                 [p] { index_count_kernel(p); });
    launch_scan(p.counts, p.totals, p.tiles << p.bits);
    simt::launch({"index_scatter_kernel", blocks, IndexConfig::kThreads, 0, true},
                 [p] { index_scatter_kernel(p); });
  }
  IndexResultParams r = result;
  r.keys = keys[passes % 2], r.slots = slots[passes % 2];
  simt::launch(
      {"index_lists_kernel", blocks_for(count, IndexConfig::kThreads, 3), IndexConfig::kThreads, 0, true},
      [r] { index_lists_kernel(r); });
  simt::launch({"index_offsets_kernel", blocks_for(r.unused_key + 1, IndexConfig::kThreads, 3),
                IndexConfig::kThreads, 0, true},
               [r] { index_offsets_kernel(r); });
  launch_scan(r.tile_begin, a.array<uint32_t>("tile_totals"), r.unused_key + 1);
}

// ---- attention

template <class T, int kDim>
void launch_attend(const AttendChunkParams<T>& p, int64_t blocks) {
  using Config = AttendChunkConfig<T, kDim>;
  AttendChunkParams<T> q = p;
  const int64_t keys = p.attend.chunk_size < Config::kKeys ? p.attend.chunk_size : Config::kKeys;
  q.key_rows = static_cast<int>((keys + 15) / 16 * 16);
  const int64_t shared = Config::shared_bytes(q.key_rows, q.key_slots, q.ahead);
  simt::launch({"attend_chunk_kernel", dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads),
                static_cast<size_t>(shared), true},
               [q] { attend_chunk_kernel<Config>(q); });
}

template <class T>
void dispatch_attend(const AttendChunkParams<T>& p, int64_t blocks) {
#define LAUNCH(Element, kDim)                                                \
  if constexpr (std::is_same_v<Element, T>) {                                \
    if (p.attend.head_dim <= kDim) return launch_attend<T, kDim>(p, blocks); \
  }
  RESONA_ATTEND_CHUNK_INSTANCES(LAUNCH)
#undef LAUNCH
  throw std::invalid_argument("attend_chunk: no instance for this head_dim");
}

template <class T, class P>
void dispatch_merge(const AttendChunkParams<T>& c, int64_t blocks) {
  const AttendMergeParams<T, P> p{c.attend,      c.position,      static_cast<const P*>(c.partial),
                                  c.partial_lse, c.partial_scale, c.slots};
#define LAUNCH(Element, Partial, kDim)                                                                   \
  if constexpr (std::is_same_v<Element, T> && std::is_same_v<Partial, P>) {                              \
    using Config = AttendMergeConfig<Element, Partial, kDim>;                                            \
    if (p.attend.head_dim <= kDim)                                                                       \
      return simt::launch(                                                                               \
          {"attend_merge_kernel", dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), 0, true}, \
          [p] { attend_merge_kernel<Config>(p); });                                                      \
  }
  RESONA_ATTEND_MERGE_INSTANCES(LAUNCH)
#undef LAUNCH
  throw std::invalid_argument("attend_merge: no instance for this head_dim");
}

// The problem of queries [begin, end) of a batch entry, as attend_chunk.cuh describes it.
template <class T>
AttendParams<T> range_of(const AttendParams<T>& whole, int64_t batch, int64_t begin, int64_t end) {
  AttendParams<T> p = whole;
  const int64_t row = batch * whole.queries + begin;
  p.batch = 1, p.queries = end - begin;
  p.query.data = whole.query.at(batch, begin, 0);
  p.key.data = whole.key.at(batch, 0, 0), p.value.data = whole.value.at(batch, 0, 0);
  p.indices += row * p.retrieval_heads * p.top_k;
  if (p.bias) p.bias += row * p.retrieval_heads * p.top_k;
  p.out += row * p.heads * p.head_dim, p.lse += row * p.heads;
  return p;
}

template <class T>
void run_range(const simt::Arguments& a, const AttendParams<T>& problem, int64_t before, int64_t behind) {
  AttendChunkParams<T> p{};
  p.attend = problem;
  p.slots = problem.batch * problem.queries * problem.retrieval_heads * problem.top_k;
  p.keys = problem.batch * problem.retrieval_heads * problem.chunks;
  p.item_rows = static_cast<int>(a.integer("item_rows"));
  IndexResultParams r{};
  r.list = a.array<uint32_t>("list"), r.position = a.array<int32_t>("position");
  r.offsets = a.array<uint32_t>("offsets"), r.tile_begin = a.array<uint32_t>("tile_begin");
  r.count = p.slots, r.slots_per_query = problem.retrieval_heads * problem.top_k, r.unused_key = p.keys;
  r.rows_per_query = problem.group(), r.tile_rows = p.item_rows;
  build_index(a, problem, before, behind, r);

  p.list = r.list, p.position = r.position, p.offsets = r.offsets;
  p.tile_begin = r.tile_begin, p.tile_totals = a.array<uint32_t>("tile_totals");
  p.key_slots = static_cast<int>(a.integer("key_slots"));
  p.ahead = a.integer("ahead") != 0;
  const std::string& result = a.text("result");
  p.result = result == "final"  ? AttendResult::kFinal
             : result == "half" ? AttendResult::kPartialHalf
                                : AttendResult::kPartialFloat;
  const int64_t blocks = a.integer("blocks");
  if (p.result == AttendResult::kFinal) return dispatch_attend(p, blocks);
  p.partial_lse = a.array<float>("partial_lse");
  if constexpr (sizeof(T) == 2) {
    if (p.result == AttendResult::kPartialHalf) {
      p.partial = a.array<Half>("partial");
      p.partial_scale = a.array<float>("partial_scale");
      dispatch_attend(p, blocks);
      return dispatch_merge<T, Half>(p, blocks);
    }
  }
  p.partial = a.array<float>("partial");
  dispatch_attend(p, blocks);
  dispatch_merge<T, float>(p, blocks);
}

template <class T>
void run_of(const simt::Arguments& a) {
  const AttendParams<T> whole = simt::attend_params<T>(a);
  const int64_t range = a.integer("range");
  if (range == 0) return run_range(a, whole, 0, 0);
  for (int64_t b = 0; b < whole.batch; ++b)
    for (int64_t begin = 0; begin < whole.queries; begin += range) {
      const int64_t end = begin + range < whole.queries ? begin + range : whole.queries;
      run_range(a, range_of(whole, b, begin, end), begin, whole.queries - end);
    }
}

void run(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  if (dtype == "float32") return run_of<float>(a);
  if (dtype == "float16") return run_of<Half>(a);
  run_of<BFloat16>(a);
}

const simt::Registration registration("attend_chunk", run);

}  // namespace
