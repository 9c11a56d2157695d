// The launch between search and attention of a decode step in two levels: inside the superchunks whose
// centroids are the best.
//
//   a block per range of searched chunks of one (sequence, retrieval head). The searched chunks are numbered
//   0, 1, ...: those of the best superchunk, of the second best, ..., of the m-th, of the open one
//     keys of all ranges of centroids -> the superchunks that this range lies in     each block for itself,
//                                                                    as many rounds as the last of them ranks
//     place in the range -> chunk                                    kept where its key will stand
//     decode_score.cuh over those rows
//
// The order of keys is total, so the order in which superchunks are searched decides nothing. Nothing here
// waits: the centroids are those of the launch before, and the next one reads the keys as it would read those
// of all chunks.
//
// Bytes: (m P + P / 2) E per (sequence, retrieval head), each row once, and 8 m per range of centroids and
// block from the L2.
#pragma once

#include "cuda/decode_score.cuh"
#include "cuda/ptx/griddepcontrol.cuh"

namespace resona::cuda {

template <class T>
struct DecodeRefineParams {
  DecodeScoreParams<T> score;       // of chunks
  int64_t chunk_size;               // S
  int64_t superchunk_size, probes;  // P, m
  const uint64_t* keys;             // [B, R, lists, kept] of the centroids
  int64_t range, lists, kept;       // of those
  const int32_t* positions;         // [B], -1: no room
};

template <class T>
struct DecodeRefineConfig : DecodeScoreConfig<T> {
  static constexpr int kRegisterCap = 128;
  static constexpr int kMinBlocks = 4;
};

template <class Config>
struct DecodeRefineStorage {
  DecodeScoreStorage<Config> score;
  int32_t superchunks[Config::kMostRange];  // that the range lies in; of one chunk each, that many
};

template <class Config, class T>
__device__ __forceinline__ void refine_range(const DecodeRefineParams<T>& p, int64_t item,
                                             DecodeRefineStorage<Config>& storage) {
  const int64_t list = item % p.score.lists, group = item / p.score.lists;
  const int64_t batch = group / p.score.heads, head = group % p.score.heads;
  const int64_t position = p.positions[batch], size = p.superchunk_size;
  const int64_t eligible = position < 0 ? 0 : canonical::eligible_chunks(position, p.chunk_size);
  const int64_t first = list * p.score.range;
  const int64_t left = canonical::searched_chunks(eligible, size, p.probes) - first;
  if (left <= 0) return;
  const DecodeRange range{batch, head, list, left < p.score.range ? left : p.score.range};

  const int64_t whole = eligible / size, probed = whole < p.probes ? whole : p.probes;
  const int64_t begin = first / size, last = (first + range.count - 1) / size;
  const int64_t lists = (whole + p.range - 1) / p.range;
  int32_t* superchunks = storage.superchunks;
  select_best(p.keys + group * p.lists * p.kept, lists * p.kept, last < probed ? last + 1 : probed,
              storage.score.select, [superchunks, begin](int64_t slot, uint64_t key) {
                if (slot >= begin) superchunks[slot - begin] = chunk_of_key(key);
              });
  if (threadIdx.x == 0 && last >= probed) superchunks[probed - begin] = static_cast<int32_t>(whole);
  __syncthreads();  // thread 0 has written the superchunks
  for (int64_t i = threadIdx.x; i < range.count; i += Config::kThreads) {
    const auto place = static_cast<uint32_t>(first + i), chunks = static_cast<uint32_t>(size);
    storage.score.keys[i] = superchunks[place / chunks - begin] * size + place % chunks;
  }
  __syncthreads();  // all numbers are written
  const uint64_t* numbers = storage.score.keys;
  score_range<Config>(
      p.score, range, [numbers](int64_t i) { return static_cast<int64_t>(numbers[i]); }, storage.score);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    decode_refine_kernel(DecodeRefineParams<typename Config::Element> p) {
  using Storage = DecodeRefineStorage<Config>;
  static_assert(sizeof(Storage) <= 48 * 1024, "no launch has to ask");
  RESONA_SHARED(Storage, storage);
  ptx::griddepcontrol_wait();
  refine_range<Config>(p, blockIdx.x, storage);
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
