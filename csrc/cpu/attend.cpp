// Attention over the selected chunks, chunk-stationary.
//
//   for each range of queries and key/value head
//     turn the selection around: chunk -> the rows that selected it
//     for each chunk, ascending
//       pack K^T and V once
//       for each tile of its rows: S = Q K^T, softmax against the running peak, O = P V,
//                                  accumulator[row] = decay * accumulator[row] + O
//     divide, add the sink, write
//
// A row meets its chunks in ascending order whatever the ranges and tiles, so results do not depend on
// them or on the number of threads. Accumulators are fp32 and stay in the task's scratch: there are no
// partial results in memory.
#include "cpu/attend_finish.h"
#include "cpu/attend_tiles.h"
#include "cpu/attend_vector.h"
#include "cpu/stage_clock.h"
#include "cpu/stages.h"

namespace resona::cpu {
namespace {

template <class Attention>
struct Scratch {
  Scratch(const AttendProblem& p, const AttendPlan& plan)
      : running(std::min(plan.query_range, p.shape.queries) * (p.shape.heads / p.shape.kv_heads),
                Attention::width(p.shape.head_dim)),
        attention(p, plan) {}
  Running<typename Attention::Accumulator> running;
  Attention attention;
  // Of the ranges of the last task: the next one is often of another head with the same selection.
  std::vector<ChunkLists> lists;
  Task listed{};
};

template <class Attention>
void attend_chunk(const AttendProblem& p, const AttendPlan& plan, const Task& task, const ChunkLists& lists,
                  const Run& run, Scratch<Attention>& s) {
  const int64_t chunk_size = p.shape.chunk_size;
  for (int64_t first = 0; first < chunk_size; first += plan.key_tile) {
    const int64_t count = std::min(plan.key_tile, chunk_size - first);
    {
      const StageScope pack(Stage::kPack);
      s.attention.load_keys(task, task.sequence->token_begin + run.chunk * chunk_size + first, count);
    }
    s.attention.attend(task, lists, run, count, s.running);
  }
}

template <class Attention>
void attend_range(const AttendProblem& p, const AttendPlan& plan, const Task& task, const ChunkLists& lists,
                  Scratch<Attention>& s) {
  const int64_t group = p.shape.heads / p.shape.kv_heads, rows = (task.end - task.begin) * group;
  const StageScope attention(Stage::kAttention);
  s.running.reset(rows);
  s.attention.begin(task, lists);
  for (size_t i = 0; i < lists.runs.size(); ++i) {
    if (i + 1 < lists.runs.size()) s.attention.expect(task, lists.runs[i + 1].chunk);
    attend_chunk(p, plan, task, lists, lists.runs[i], s);
  }
  const StageScope merge(Stage::kMerge);
  for (int64_t row = 0; row < rows; ++row)
    finish_row(p, task.sequence->batch, task.begin + row / group, task.head * group + row % group,
               s.running.peak[row], s.running.total[row], s.running.sum.data() + row * s.running.width,
               [&](auto factor, auto* sum, void* out) { s.attention.store(factor, sum, out); });
}

template <class Attention>
void attend_task(const AttendProblem& p, const AttendPlan& plan, const Task& task, Scratch<Attention>& s) {
  const int64_t retrieval_head = retrieval_head_of(p.shape, task.head), step = plan.query_range;
  const bool listed =
      s.listed.sequence == task.sequence && s.listed.begin == task.begin && s.listed.head == retrieval_head;
  if (!listed) s.lists.clear();
  s.listed = task, s.listed.head = retrieval_head;
  Task range = task;
  for (size_t i = 0; range.begin < task.end; ++i, range.begin = range.end) {
    range.end = std::min(range.begin + step, task.end);
    if (!listed)
      s.lists.push_back(selection_lists<typename Attention::Accumulator>(p, *task.sequence, retrieval_head,
                                                                         range.begin, range.end));
    attend_range(p, plan, range, s.lists[i], s);
  }
}

template <class Attention>
void run(const AttendProblem& p, const AttendPlan& plan, const Executor& executor) {
  const int64_t block = plan.kept_tiles > 0 ? p.shape.queries : plan.query_range;
  const auto tasks = make_tasks(*p.sequences, p.shape.kv_heads, block, query_extent);
  for_each_task(
      executor, static_cast<int64_t>(tasks.size()), [&] { return Scratch<Attention>(p, plan); },
      [&](Scratch<Attention>& s, int64_t i) { attend_task(p, plan, tasks[i], s); });
}

}  // namespace

void attend(const AttendProblem& p, const AttendPlan& plan, const Executor& executor) {
  if (plan.by_query) return attend_by_query(p, plan, executor);
  if (p.query.dtype == DType::kFloat64) return run<VectorAttention<double>>(p, plan, executor);
  plan.tiles ? run<TileAttention>(p, plan, executor) : run<VectorAttention<float>>(p, plan, executor);
}

}  // namespace resona::cpu
