// The second launch of a decode step: what the search passed on becomes a selection, and the selection an
// output. `splits` blocks share the keys of a row, which is a query with some heads of a group.
//
//   block (row, split)
//     the best k of the ranges' keys -> slots     each block for itself: k rounds over a few KB from the L2,
//                                                 where a launch of its own would cost more
//     first block of the retrieval head           writes indices and scores
//     slots -> k' S keys, tile by tile            teams of all the row's blocks take turns, in the inner
//                                                 loops of attend_query.cuh and attend_query_mma.cuh
//     teams of the block meet in shared memory
//     partial result -> memory, ticket            the last block to arrive of the row goes on:
//     partial results of all splits, ascending    however the blocks were scheduled, the same bits
//     sink, division, out and lse
//   first block of the sequence                   counts the new token, or marks a sequence without room
//
// k' is how many of the k slots are filled. Short selections wake fewer blocks: a block has a tile
// for each of its teams, or ends at once.
//
// Bytes: 4 k' S D per row in 16-bit types, and 4 (D + 2) per head and split twice, through the L2.
#pragma once

#include "cuda/attend_query.cuh"
#include "cuda/attend_query_mma.cuh"
#include "cuda/decode_select.cuh"

namespace resona::cuda {

template <class T>
struct DecodeAttendParams {
  AttendParams<T> attend;  // T = 1, L = M; indices and bias are found here
  const uint64_t* keys;    // [B, R, lists, kept] of the searched chunks
  int64_t range, lists, kept;
  int64_t superchunk_size, probes;  // P, m; 1 and no end of them where all chunks are searched
  const int32_t* positions;         // [B], -1: no room
  int32_t* lengths;                 // [B]
  int32_t* indices;                 // [B, 1, R, k]
  float* scores;                    // [B, 1, R, k]
  uint32_t* tickets;                // [rows], 0
  float* partials;                  // [rows, splits, floats of a partial]
  int32_t* slots;                   // [blocks, 2 slots], null: in shared memory
  int64_t slot_count;               // min(k, C)
  int splits;
};

constexpr int kDecodeAttendThreads = 128;
constexpr int kDecodeSlotsInShared = 512;

struct DecodeAttendStorage {
  SelectStorage<kDecodeAttendThreads / kWarpSize> select;
  int32_t slots[2 * kDecodeSlotsInShared];
  bool is_last;
};

// What a row attends to. Indices and scores lie in the block's own memory.
struct DecodeSelection {
  int eligible, searched, used;
  const int32_t* indices;
  const float* scores;
};

// How many there are is known before which.
template <class T>
__device__ __forceinline__ DecodeSelection count_slots(const DecodeAttendParams<T>& p, int64_t batch) {
  const int64_t position = p.positions[batch];
  const int64_t eligible = position < 0 ? 0 : canonical::eligible_chunks(position, p.attend.chunk_size);
  const int64_t searched = canonical::searched_chunks(eligible, p.superchunk_size, p.probes);
  const int64_t used = searched < p.attend.top_k ? searched : p.attend.top_k;
  return {static_cast<int>(eligible), static_cast<int>(searched), static_cast<int>(used), nullptr, nullptr};
}

template <class T>
__device__ __forceinline__ void select_slots(const DecodeAttendParams<T>& p, int64_t batch,
                                             int64_t retrieval_head, DecodeSelection& found,
                                             DecodeAttendStorage& storage) {
  const int64_t lists = (found.searched + p.range - 1) / p.range;
  const uint64_t* keys = p.keys + (batch * p.attend.retrieval_heads + retrieval_head) * p.lists * p.kept;
  int32_t* slots = p.slots ? p.slots + blockIdx.x * 2 * p.slot_count : storage.slots;
  float* scores = reinterpret_cast<float*>(slots + p.slot_count);
  select_best(keys, lists * p.kept, found.used, storage.select, [slots, scores](int64_t slot, uint64_t key) {
    slots[slot] = chunk_of_key(key), scores[slot] = score_of_key(key);
  });
  __syncthreads();  // thread 0 has written the slots
  found.indices = slots, found.scores = scores;
}

template <class T>
__device__ __forceinline__ void write_selection(const DecodeAttendParams<T>& p, int64_t batch,
                                                int64_t retrieval_head, const DecodeSelection& found) {
  const int64_t first = (batch * p.attend.retrieval_heads + retrieval_head) * p.attend.top_k;
  for (int64_t slot = threadIdx.x; slot < p.attend.top_k; slot += kDecodeAttendThreads) {
    p.indices[first + slot] = slot < found.used ? found.indices[slot] : -1;
    p.scores[first + slot] = slot < found.used ? found.scores[slot] : kLowest;
  }
}

template <class T>
__device__ __forceinline__ void count_token(const DecodeAttendParams<T>& p, int64_t batch) {
  const int32_t position = p.positions[batch], length = p.lengths[batch];
  if (position >= 0)
    p.lengths[batch] = position + 1;
  else if (length >= 0)
    p.lengths[batch] = -length - 1;
}

// The team's own of the keys in all slots: every `step`-th tile from number `tile` on.
template <class T>
__device__ __forceinline__ QueryKeys decode_keys(const DecodeAttendParams<T>& p, const QueryRow& row,
                                                 const DecodeSelection& found, uint32_t first,
                                                 uint32_t step) {
  QueryKeys keys;
  keys.indices = found.indices, keys.first_slot = 0;
  const float* scale = p.attend.bias_scale;
  keys.bias = scale ? found.scores : nullptr;
  keys.bias_scale = scale ? scale[p.attend.retrieval_head(row.kv_head)] : 1.0f;
  keys.slots = found.used, keys.eligible = found.eligible;
  keys.token_begin = 0;
  start_at(keys, p.attend.chunk_size, first, step);
  return keys;
}

// Blocks of the row that have something to do.
template <class T>
__device__ __forceinline__ int active_splits(const DecodeAttendParams<T>& p, int used, int block_keys) {
  const int64_t keys = used * p.attend.chunk_size, wanted = (keys + block_keys - 1) / block_keys;
  return wanted < 1 ? 1 : wanted < p.splits ? static_cast<int>(wanted) : p.splits;
}

// Whether all other blocks of the row have handed in their partial results, which may be read then.
__device__ __forceinline__ bool is_last_of_row(uint32_t* ticket, int blocks, DecodeAttendStorage& storage) {
  __syncthreads();  // the block's own is written
  if (threadIdx.x == 0)
    storage.is_last = ptx::atom_add_acq_rel_gpu(ticket, 1) + 1 == static_cast<uint32_t>(blocks);
  __syncthreads();
  return storage.is_last;
}

// Adds up the partial results of a row's blocks, and tells the one block that has the sum in its first team.
template <int kLanes, class Partial, class T>
__device__ __forceinline__ bool meet_blocks(const DecodeAttendParams<T>& p, int64_t row, int split,
                                            int splits, Partial& partial, DecodeAttendStorage& storage) {
  constexpr int kTeams = kDecodeAttendThreads / kLanes;
  if (splits == 1) return true;
  const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float* partials = p.partials + row * p.splits * (Partial::kFloats * kLanes) + lane;
  if (team == 0) partial.store(partials + split * (Partial::kFloats * kLanes), kLanes);
  if (!is_last_of_row(p.tickets + row, splits, storage)) return false;
  partial.clear();
  for (int s = team; s < splits; s += kTeams) partial.add(partials + s * (Partial::kFloats * kLanes), kLanes);
  merge_splits<kDecodeAttendThreads, kLanes>(partial, kTeams);
  return true;
}

// One block. attend(row, list) returns the QueryPartial of the thread's team, whose keys list() tells;
// write(row, partial) ends the row. Both are called by all threads.
template <int kLanes, int kTile, int kHeads, class T, class Attend, class Write>
__device__ __forceinline__ void decode_row(const DecodeAttendParams<T>& p, DecodeAttendStorage& storage,
                                           const Attend& attend, const Write& write) {
  constexpr int kTeams = kDecodeAttendThreads / kLanes;
  const int64_t number = blockIdx.x / p.splits;
  const int split = static_cast<int>(blockIdx.x % p.splits), team = threadIdx.x / kLanes;
  const QueryRow row = query_row(p.attend, number, kHeads);
  const int retrieval_head = p.attend.retrieval_head(row.kv_head);
  DecodeSelection found = count_slots(p, row.batch);
  const int splits = active_splits(p, found.used, kTeams * kTile);
  if (split >= splits) return;
  select_slots(p, row.batch, retrieval_head, found, storage);
  if (split == 0 && row.head == retrieval_head * (p.attend.heads / p.attend.retrieval_heads)) {
    write_selection(p, row.batch, retrieval_head, found);
    if (retrieval_head == 0 && threadIdx.x == 0) count_token(p, row.batch);
  }
  const int tile = split * kTeams + team, lane = threadIdx.x % kTile;
  const auto list = [&] { return decode_keys(p, row, found, tile * kTile + lane, splits * kTeams * kTile); };
  auto partial = attend(row, list);
  merge_splits<kDecodeAttendThreads, kLanes>(partial, kTeams);
  if (meet_blocks<kLanes>(p, number, split, splits, partial, storage)) write(row, partial);
}

// ---- the instances

struct DecodeLanesConfig {
  static constexpr int kRegisterCap = 168;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    decode_lanes_kernel(DecodeAttendParams<typename Config::Element> p) {
  static_assert(Config::kThreads == kDecodeAttendThreads);
  RESONA_SHARED(DecodeAttendStorage, storage);
  ptx::griddepcontrol_wait();
  decode_row<Config::kLanes, Config::kTile, Config::kHeads>(
      p, storage,
      [&p](const QueryRow& row, const auto& list) {
        QueryState<Config> state;
        attend_listed_keys<Config>(p.attend, row, list(), state);
        return state;
      },
      [&p](const QueryRow& row, const QueryState<Config>& state) {
        const bool writes = threadIdx.x < Config::kLanes;
        write_query_row<Config>(p.attend, writes ? row : QueryRow{0, 0, 0, 0, 0}, state);
      });
  ptx::griddepcontrol_launch_dependents();
}

struct DecodeMmaConfig {
  static constexpr int kRegisterCap = 255;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    decode_mma_kernel(DecodeAttendParams<typename Config::Element> p) {
  static_assert(Config::kThreads == kDecodeAttendThreads);
  using QueryStorage = QueryMmaStorage<Config>;
  using Partial = QueryPartial<Config::kRows, Config::kValues>;
  RESONA_SHARED(DecodeAttendStorage, storage);
  RESONA_SHARED(QueryStorage, query);
  static_assert(sizeof(storage) + sizeof(query) + Config::kSplitBytes <= 48 * 1024, "no launch has to ask");
  QueryStorage& of_block = query;  // shared memory has static storage: lambdas cannot capture it
  ptx::griddepcontrol_wait();
  decode_row<kWarpSize, Config::kKeys, Config::kHeads>(
      p, storage,
      [&p, &of_block](const QueryRow& row, const auto& list) {
        QueryMmaState<Config> state;
        attend_listed_keys_mma<Config>(p.attend, row, list, of_block, state);
        return by_heads<Config>(state);
      },
      [&p](const QueryRow& row, const Partial& partial) {
        if (threadIdx.x < kWarpSize) write_query_mma_row<Config>(p.attend, row, partial);
      });
  ptx::griddepcontrol_launch_dependents();
}

// Every instance: (element, lanes per row, heads at once, vector loads). Rows of 16 bytes in 16-bit types
// take the tensor cores, as RESONA_ATTEND_QUERY_MMA_INSTANCES has them.
#define RESONA_DECODE_LANES_INSTANCES(X) \
  X(float, 8, 1, true)                   \
  X(float, 16, 1, true)                  \
  X(float, 32, 1, true)                  \
  X(float, 16, 4, true)                  \
  X(float, 32, 4, true)                  \
  X(float, 32, 1, false)                 \
  X(Half, 32, 1, false)                  \
  X(BFloat16, 32, 1, false)

}  // namespace resona::cuda
