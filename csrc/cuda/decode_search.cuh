// The first launch of a decode step: new tokens join the cache, and every chunk that was closed before is
// scored; in a search in two levels, every centroid, and the chunks are left to decode_refine.cuh.
//
//   blocks 0 .. B - 1    append a token each (decode_append.cuh); where it goes, for the other launches
//   the others           a range of candidates of one (sequence, retrieval head): decode_score.cuh
//
// The next launch reads what every range passed on. That costs k keys of 8 bytes per range, and saves a
// launch in between or a ticket with a kernel to zero it.
//
// Bytes: embeddings of the candidates before the token once, C E 2 for 16-bit types.
//
// A sequence without room for its token (full, or marked so before) is left alone: its position is -1.
#pragma once

#include "cuda/decode_append.cuh"
#include "cuda/decode_score.cuh"
#include "cuda/ptx/griddepcontrol.cuh"

namespace resona::cuda {

template <class T>
struct DecodeSearchParams {
  DecodeAppendParams<T> append;
  DecodeScoreParams<T> score;  // of chunks, or centroids
  int64_t span;                // tokens of a candidate: S, or S P
  const int32_t* lengths;      // [B], written by the last launch
  int64_t batch, capacity;     // B, M
  int32_t* positions;          // [B]
  uint32_t* tickets;           // [B, tickets_per_batch], zeroed for the last launch
  int64_t tickets_per_batch;
};

template <class T>
struct DecodeSearchConfig : DecodeScoreConfig<T> {
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks = 4;
};

// Where the new token goes, or -1.
template <class T>
__device__ __forceinline__ int64_t decode_position(const DecodeSearchParams<T>& p, int64_t batch) {
  const int64_t length = p.lengths[batch];
  return length >= 0 && length < p.capacity ? length : -1;
}

template <class T>
__device__ __forceinline__ void begin_sequence(const DecodeSearchParams<T>& p, int64_t batch) {
  const int64_t position = decode_position(p, batch);
  if (threadIdx.x == 0) p.positions[batch] = static_cast<int32_t>(position);
  for (int64_t i = threadIdx.x; i < p.tickets_per_batch; i += blockDim.x)
    p.tickets[batch * p.tickets_per_batch + i] = 0;
  if (position >= 0) append_token(p.append, batch, position);
}

template <class Config, class T>
__device__ __forceinline__ void search_range(const DecodeSearchParams<T>& p, int64_t item,
                                             DecodeScoreStorage<Config>& storage) {
  const int64_t list = item % p.score.lists, group = item / p.score.lists;
  const int64_t batch = group / p.score.heads, head = group % p.score.heads;
  const int64_t position = decode_position(p, batch);
  const int64_t eligible = position < 0 ? 0 : canonical::eligible_chunks(position, p.span);
  const int64_t first = list * p.score.range, left = eligible - first;
  if (left <= 0) return;
  const DecodeRange range{batch, head, list, left < p.score.range ? left : p.score.range};
  score_range<Config>(p.score, range, [first](int64_t i) { return first + i; }, storage);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    decode_search_kernel(DecodeSearchParams<typename Config::Element> p) {
  using Storage = DecodeScoreStorage<Config>;
  RESONA_SHARED(Storage, storage);
  ptx::griddepcontrol_wait();
  if (blockIdx.x < p.batch)
    begin_sequence(p, blockIdx.x);
  else
    search_range<Config>(p, blockIdx.x - p.batch, storage);
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
