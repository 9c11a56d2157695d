// Cosine top-k over the chunks in each query's past, without a [T, C] buffer.
//
//   for each block of queries
//     for each tile of chunks, ascending
//       tile = Q C^T                                      fp32, or bfloat16 on matrix tiles
//       for each query: columns not below its threshold   one vector compare
//         -> its candidates; the k best products so far set the threshold
//     for each query: canonical score (fp64, fixed order) of the candidates still above the threshold
//                     -> sorted list
//
// A chunk that is passed over cannot belong to the top k: see search_rows.h.
#include "cpu/search_rows.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

template <class A>
void search(const RetrieveProblem& p, const SearchPlan& plan, const Executor& executor) {
  const auto tasks = make_tasks(*p.sequences, p.shape.retrieval_heads, plan.query_block, query_extent);
  const int64_t slots = std::min(p.shape.top_k, p.shape.context / p.shape.chunk_size);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()),
      [&] { return SearchScratch<A>(plan, p.shape.retrieval_dim, slots, kProductRows); },
      [&](SearchScratch<A>& s, int64_t i) {
        const StageScope search(Stage::kSearch);
        search_block(p, plan, tasks[i], s);
        write_block(p, tasks[i], s);
      });
}

}  // namespace

void retrieve(const RetrieveProblem& p, const SearchPlan& plan, const Executor& executor) {
  p.query.dtype == DType::kFloat64 ? search<double>(p, plan, executor) : search<float>(p, plan, executor);
}

}  // namespace resona::cpu
