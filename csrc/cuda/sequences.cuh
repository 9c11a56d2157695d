// Packed sequences on the device: which rows of the chunk buffer belong to which sequence.
//
// chunk_offsets_kernel, one block, writes chunk_begin[0..n]: chunks of sequence 0, 1, ... one after another.
// 256 sequences at a time: the chunks of each, summed over the block, behind those of the tiles before.
// Bytes: 4 read and 4 written per sequence. Everything else finds its sequence by binary search in the
// result.
//
// cu_seqlens comes from the user and is never checked by the host: wrong values are clamped here, so they
// may give wrong numbers but no token beyond the context and no chunk beyond the buffer.
#pragma once

#include "common/canonical.h"
#include "cuda/device.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/scan.cuh"

namespace resona::cuda {

struct PackedSequences {
  const int32_t* cu_seqlens;   // [count + 1], null: not packed
  const int32_t* chunk_begin;  // [count + 1], by chunk_offsets_kernel
  int64_t count;
};

__device__ __forceinline__ int64_t clamp_token(int64_t token, int64_t context) {
  return token < 0 ? 0 : token > context ? context : token;
}

struct ChunkOffsetsParams {
  const int32_t* cu_seqlens;  // [count + 1]
  int32_t* chunk_begin;       // [count + 1]
  int64_t count;
  int64_t context, chunk_size;  // L, S
};

struct ChunkOffsetsConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kRegisterCap = 48;
};

struct ChunkOffsetsStorage {
  int64_t warp_totals[ChunkOffsetsConfig::kWarps];
};

__device__ __forceinline__ int64_t chunks_of_sequence(const ChunkOffsetsParams& p, int64_t i) {
  if (i >= p.count) return 0;
  const int64_t begin = clamp_token(p.cu_seqlens[i], p.context);
  const int64_t end = clamp_token(p.cu_seqlens[i + 1], p.context);
  return end <= begin ? 0 : (end - begin) / p.chunk_size;
}

static __global__ void __launch_bounds__(ChunkOffsetsConfig::kThreads)
    chunk_offsets_kernel(ChunkOffsetsParams p) {
  RESONA_SHARED(ChunkOffsetsStorage, storage);
  const int thread = threadIdx.x;
  const int64_t bound = p.context / p.chunk_size;
  ptx::griddepcontrol_wait();
  if (thread == 0) p.chunk_begin[0] = 0;
  int64_t before = 0;  // chunks of the tiles so far
  for (int64_t tile = 0; tile < p.count; tile += ChunkOffsetsConfig::kThreads) {
    const int64_t chunks = chunks_of_sequence(p, tile + thread);
    const BlockSums<int64_t> sums = block_scan(chunks, storage.warp_totals);
    const int64_t end = before + sums.before + chunks;
    if (tile + thread < p.count)
      p.chunk_begin[tile + thread + 1] = static_cast<int32_t>(end < bound ? end : bound);
    before += sums.total;
  }
  ptx::griddepcontrol_launch_dependents();
}

// The first token of chunk row `row`, or -1 where no sequence has that chunk.
__device__ __forceinline__ int64_t first_token_of_chunk(const PackedSequences& s, int64_t row,
                                                        int64_t context, int64_t chunk_size) {
  int64_t low = 0, high = s.count;  // the first sequence whose chunks end behind the row
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (s.chunk_begin[middle + 1] > row)
      high = middle;
    else
      low = middle + 1;
  }
  if (low == s.count) return -1;
  return clamp_token(s.cu_seqlens[low], context) + (row - s.chunk_begin[low]) * chunk_size;
}

// Where a query stands: its own sequence, and the chunks of it that lie wholly in the query's past.
struct QueryPlace {
  int64_t token_begin;  // first token of its sequence, in the context tensor
  int64_t chunk_begin;  // row of its sequence's chunk 0, in the chunk tensor
  int64_t eligible;     // chunks 0, 1, ... of its sequence that it may retrieve
};

// `query` of `queries` rows; the chunk tensor holds `chunks` rows.
__device__ __forceinline__ QueryPlace place_of_query(const PackedSequences& s, int64_t query, int64_t queries,
                                                     int64_t context, int64_t chunk_size, int64_t chunks) {
  int64_t token_begin = 0, position = query + context - queries, first = 0, end = chunks;
  if (s.cu_seqlens) {
    if (s.count == 0) return {0, 0, 0};
    int64_t low = 0, high = s.count;  // the last sequence that begins at or before the query
    while (low + 1 < high) {
      const int64_t middle = (low + high) / 2;
      if (s.cu_seqlens[middle] <= query)
        low = middle;
      else
        high = middle;
    }
    token_begin = clamp_token(s.cu_seqlens[low], context);
    position = query - token_begin;
    first = s.chunk_begin[low], end = s.chunk_begin[low + 1];
  }
  if (position < 0 || end < first) return {token_begin, first, 0};
  const int64_t past = canonical::eligible_chunks(position, chunk_size);
  return {token_begin, first, past < end - first ? past : end - first};
}

}  // namespace resona::cuda
