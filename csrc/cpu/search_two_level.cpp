// Two-level search: which superchunks, then which of their chunks.
//
//   centroids = the pooled chunks of each superchunk
//   for each block of queries
//     for each query: the m best superchunks wholly in its past    the exact search, over centroids
//     for each superchunk, the queries that like it best            lists turned around, queries gathered
//       tile = Q C^T -> their k best products                       so the thresholds stand before the scan
//     for each superchunk, ascending, the queries that probe it, or whose past ends inside of it
//       tile = Q C^T -> columns not below a query's threshold -> its candidates
//     for each query: canonical score of the candidates -> sorted list
//
// Inside the superchunks that a query searches nothing is lost: see search_rows.h.
#include <vector>

#include "cpu/lists.h"
#include "cpu/search_rows.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

constexpr int64_t kGatheredRows = 256;
constexpr int64_t kAhead = 8;  // queries

struct Levels {
  const RetrieveProblem& chunks;
  const RetrieveProblem& superchunks;
  const SearchPlan& refine;
  const SearchPlan& probe;
  int64_t superchunk_size, probes;
};

template <class A>
struct TwoLevelScratch {
  TwoLevelScratch(const Levels& levels, int64_t dim, int64_t slots)
      : rows(levels.refine, dim, slots, kGatheredRows),
        probe(levels.probe, dim, levels.probes, kProductRows),
        probed(levels.refine.query_block * levels.probes),
        gathered(kGatheredRows * dim),
        tile_gathered(kGatheredRows * padded_brick(dim)) {}
  SearchScratch<A> rows, probe;
  Buffer<int32_t> probed;          // [query_block, m], -1 where there are fewer
  Buffer<A> gathered;              // [kGatheredRows, E]
  Buffer<uint16_t> tile_gathered;  // the same as bfloat16
};

// The superchunks that each query of the task probes.
template <class A>
void probe_block(const Levels& levels, const Task& task, TwoLevelScratch<A>& s) {
  const auto number = task.sequence - levels.chunks.sequences->data();
  const Sequence* sequence = levels.superchunks.sequences->data() + number;
  for (int64_t begin = task.begin; begin < task.end; begin += levels.probe.query_block) {
    const Task part{sequence, task.head, begin, std::min(begin + levels.probe.query_block, task.end)};
    search_block(levels.superchunks, levels.probe, part, s.probe);
    for (int64_t i = 0; i < part.end - begin; ++i) {
      int32_t* to = s.probed.data() + (begin - task.begin + i) * levels.probes;
      const int64_t found = s.probe.queries[i].found;
      std::copy_n(s.probe.indices.data() + i * levels.probes, found, to);
      std::fill(to + found, to + levels.probes, -1);
    }
  }
}

// Tile row i = the filter of query entries[i].row times the packed chunks.
template <class A>
void multiply_gathered(const Entry* entries, int64_t count, int64_t width, int64_t dim,
                       TwoLevelScratch<A>& s) {
  if constexpr (std::is_same_v<A, float>) {
    if (s.rows.scope != nullptr) {
      const int64_t depth = padded_brick(dim);
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(s.rows.tile_filter.data() + entries[i].row * depth, depth,
                    s.tile_gathered.data() + i * depth);
      return kernel_set().tiles->gemm({padded_tile(count), width, depth, s.tile_gathered.data(), depth,
                                       s.rows.tile_packed.data(), s.rows.tile.data(), width, false});
    }
  }
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(s.rows.filter.data() + entries[i].row * dim, dim, s.gathered.data() + i * dim);
  kernels<A>().gemm({count, width, dim, s.gathered.data(), dim, 1, s.rows.packed.data(), width,
                     s.rows.tile.data(), width, false});
}

// What scan_row will look at: neighbours in a list are not neighbours in memory.
template <class A>
void fetch(SearchScratch<A>& s, int64_t row) {
  __builtin_prefetch(&s.queries[row]);
  __builtin_prefetch(s.best.data() + row * s.best_stride);
  __builtin_prefetch(s.products.data() + row * s.candidate_stride);
  __builtin_prefetch(s.candidates.data() + row * s.candidate_stride);
}

// A superchunk meets the queries of its entries: calls visit(entry, first, count, products) for each tile of
// chunks [first, first + count) in the query's past.
template <class A, class Visit>
void scan_superchunk(const Levels& levels, const Task& task, const Entry* entries, int64_t count,
                     int64_t superchunk, TwoLevelScratch<A>& s, const Visit& visit) {
  const int64_t dim = levels.chunks.shape.retrieval_dim;
  const int64_t begin = superchunk * levels.superchunk_size;
  int64_t end = begin;  // where the past of the last of the queries ends, if not behind the superchunk
  for (int64_t i = 0; i < count; ++i) end = std::max(end, s.rows.queries[entries[i].row].eligible);
  end = std::min(end, begin + levels.superchunk_size);
  for (int64_t first = begin; first < end; first += levels.refine.chunk_block) {
    const int64_t chunks = std::min(levels.refine.chunk_block, end - first), width = padded(chunks);
    load_chunks(levels.chunks, task, first, chunks, s.rows);
    for (int64_t i = 0; i < count; i += kGatheredRows) {
      const int64_t group = std::min(kGatheredRows, count - i);
      multiply_gathered(entries + i, group, width, dim, s);
      for (int64_t g = 0; g < group; ++g) {
        const Entry& entry = entries[i + g];
        fetch(s.rows, entries[std::min(i + g + kAhead, count - 1)].row);
        const int64_t seen = std::min(chunks, s.rows.queries[entry.row].eligible - first);
        if (seen > 0) visit(entry, first, seen, s.rows.tile.data() + g * width);
      }
    }
  }
}

template <class A, class Visit>
void scan_lists(const Levels& levels, const Task& task, const ChunkLists& lists, TwoLevelScratch<A>& s,
                const Visit& visit) {
  for (const Run& run : lists.runs)
    scan_superchunk(levels, task, lists.entries.data() + run.begin, run.end - run.begin, run.chunk, s, visit);
}

template <class A>
void refine_block(const Levels& levels, const Task& task, TwoLevelScratch<A>& s) {
  const int64_t dim = levels.chunks.shape.retrieval_dim, rows = task.end - task.begin;
  load_queries(levels.chunks, task, s.rows);
  s.rows.largest_chunk_norm = 0;
  s.rows.error = s.rows.scope == nullptr ? fp32_error(dim)
                                         : tile_error(dim, levels.chunks.query.dtype != DType::kBFloat16);
  const int64_t last = s.rows.queries[rows - 1].eligible / levels.superchunk_size;
  const auto probed = [&](int64_t row, int64_t slot) { return s.probed[row * levels.probes + slot]; };
  if constexpr (std::is_same_v<A, float>) {
    scan_lists(levels, task, build_lists(rows, 1, last + 1, probed), s,
               [&](const Entry& entry, int64_t, int64_t count, const A* products) {
                 float* best = s.rows.best.data() + entry.row * s.rows.best_stride;
                 for (int64_t c = 0; c < count; ++c) rank(products[c], best, s.rows);
               });
  }
  // The last slot is the superchunk in which the query's past ends.
  const auto searched = [&](int64_t row, int64_t slot) {
    if (slot < levels.probes) return probed(row, slot);
    return static_cast<int32_t>(s.rows.queries[row].eligible / levels.superchunk_size);
  };
  scan_lists(levels, task, build_lists(rows, levels.probes + 1, last + 1, searched), s,
             [&](const Entry& entry, int64_t first, int64_t count, const A* products) {
               scan_row(levels.chunks, task, entry.row, first, count, products, s.rows, entry.slot == 0);
             });
  const StageScope rescore(Stage::kRescore);
  for (int64_t row = 0; row < rows; ++row) refine(levels.chunks, task, row, s.rows.capacity + 1, s.rows);
}

template <class A>
void search(const Levels& levels, const Executor& executor) {
  const Shape& shape = levels.chunks.shape;
  const auto tasks =
      make_tasks(*levels.chunks.sequences, shape.retrieval_heads, levels.refine.query_block, query_extent);
  const int64_t slots = std::min(shape.top_k, shape.context / shape.chunk_size);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()),
      [&] { return TwoLevelScratch<A>(levels, shape.retrieval_dim, slots); },
      [&](TwoLevelScratch<A>& s, int64_t i) {
        const StageScope search(Stage::kSearch);
        probe_block(levels, tasks[i], s);
        refine_block(levels, tasks[i], s);
        write_block(levels.chunks, tasks[i], s.rows);
      });
}

// The chunk rows of each sequence as its tokens, and where its superchunks begin.
std::vector<Sequence> over_chunks(const TwoLevelProblem& p) {
  std::vector<Sequence> result;
  int64_t begin = 0, batch = 0;
  for (const Sequence& s : *p.retrieve.sequences) {
    if (s.batch != batch) batch = s.batch, begin = 0;
    const int64_t chunks = s.token_count / p.retrieve.shape.chunk_size;
    result.push_back({s.batch, 0, 0, s.chunk_begin, chunks, begin});
    begin += chunks / p.plan.superchunk_size;
  }
  return result;
}

// The same queries before the centroids.
std::vector<Sequence> over_superchunks(const TwoLevelProblem& p, const std::vector<Sequence>& pooled) {
  std::vector<Sequence> result = *p.retrieve.sequences;
  for (size_t i = 0; i < result.size(); ++i) result[i].chunk_begin = pooled[i].chunk_begin;
  return result;
}

}  // namespace

void retrieve_two_level(const TwoLevelProblem& p, const Device& device, const Executor& executor) {
  const RetrieveProblem& chunks = p.retrieve;
  if (p.is_exact()) return retrieve(chunks, plan_search(chunks.shape, chunks.query.dtype, device), executor);
  const Shape pooled_shape = centroid_shape(p), shape = probe_shape(p);
  const std::vector<Sequence> pooled = over_chunks(p), probing = over_superchunks(p, pooled);
  Buffer<unsigned char> memory(bytes_of_centroids(p));
  const int64_t dim = shape.retrieval_dim, row = shape.retrieval_heads * dim;
  const MutableRows centroids{memory.data(), p.superchunks() * row, row, dim, chunks.chunks.dtype};
  pool_chunks({pooled_shape, &pooled, {}, chunks.chunks, centroids}, plan_pool(pooled_shape, device),
              executor);
  RetrieveProblem superchunks{};
  superchunks.shape = shape, superchunks.sequences = &probing, superchunks.query = chunks.query;
  superchunks.chunks = {centroids.data, centroids.batch_stride, centroids.token_stride, centroids.head_stride,
                        centroids.dtype};
  const SearchPlan refine = plan_refine(p, device), probe = plan_search(shape, chunks.query.dtype, device);
  const Levels levels{chunks, superchunks, refine, probe, p.plan.superchunk_size, p.plan.probes};
  chunks.query.dtype == DType::kFloat64 ? search<double>(levels, executor) : search<float>(levels, executor);
}

}  // namespace resona::cpu
