// One new token per sequence, as plain data: what a decode step reads, appends to and returns. The shape has
// queries T = 1 and context M, the capacity of the cache.
#pragma once

#include "common/problem.h"

namespace resona {

struct DecodeProblem {
  Shape shape;
  Rows query;                               // [B, 1, H, D]
  Rows key, value;                          // [B, 1, Hkv, D]
  Rows query_embedding, context_embedding;  // [B, 1, R, E]
  MutableRows key_cache, value_cache;       // [B, M, Hkv, D]
  MutableRows chunks;                       // [B, M / S, R, E]
  void* open_sum;                           // [B, R, E] float, or double for float64 embeddings
  MutableRows history;                      // [B, W, R, E]; token p in row p % W
  int64_t history_rows;                     // W, may be 0
  int32_t* lengths;                         // [B] tokens in the cache before the step
  const void* score_scale;                  // [R], or null; float, or double for float64 queries
  const void* sink;                         // [H], or null; likewise
  double scale;                             // factor of <query, key>
  int32_t* indices;                         // [B, 1, R, k]
  void* scores;                             // [B, 1, R, k] float, or double for float64 embeddings
  MutableRows out;                          // [B, 1, H, D]
  void* lse;                                // [B, 1, H] float, or double for float64 queries

  // Of a search in two levels, as in TwoLevelPlan; superchunk_size 0: all chunks are searched.
  int64_t superchunk_size, probes;  // P, m
  MutableRows superchunks;          // [B, M / S / P, R, E] unit-norm sums of P chunks
  void* superchunk_sum;             // [B, R, E] of the chunks of the open superchunk, typed like open_sum

  bool two_level() const { return superchunk_size > 0; }
  // Whether a query with so many chunks in its past has more superchunks there than it may search.
  bool probes_centroids(int64_t eligible) const { return two_level() && eligible / superchunk_size > probes; }
};

}  // namespace resona
