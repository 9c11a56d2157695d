// The plan of a decode step on CUDA: two launches, three in two levels. See csrc/cuda/decode.cu for the
// sequence.
//
// Lengths live on the device, so the plan counts with a full cache; what a shorter one has no work for, ends
// at once.
#pragma once

#include "common/plan_cuda.h"

namespace resona {

// What the plan counts with; decode.cu asserts that the kernels agree.
constexpr int64_t kDecodeMostRange = 1024;  // chunks or centroids that a block scores
constexpr int64_t kDecodeSharedSlots = 512;
constexpr int64_t kDecodeThreads = 128;

struct CudaDecodeFacts {
  DType dtype, embedding_dtype;
  bool vector_rows;    // query, key, value, both caches and out are rows_of_16_bytes
  bool vector_chunks;  // the chunk embeddings are, and those of superchunks
  // As in DecodeProblem.
  int64_t superchunk_size = 0, probes = 0;
};

// Rows that a query is compared with, cut into ranges of which a block scores each.
struct CudaDecodeRanges {
  int64_t range;  // rows
  int64_t lists;  // ranges of a full cache
  int64_t kept;   // of a range: its best, or all of it
};

struct CudaDecodePlan {
  const char* kernel;
  const char* reason;

  bool probes;                 // a full cache has more superchunks than a query may search
  CudaDecodeRanges centroids;  // of the first launch, if it probes
  CudaDecodeRanges chunks;     // of the first launch, or of the second, which has only those in superchunks
  bool vector_chunks;
  int64_t search_blocks;            // of the first launch: one for each new token, one for each range
  int64_t refine_blocks;            // of the second, if it probes
  int64_t superchunk_size, probed;  // P, m; 1 and the largest number without

  bool tensor_cores, vector_rows;
  int64_t dim, heads;  // of the instance: rows are filled up to dim; heads of a group that share their keys
  int64_t rows;        // sequences x key/value heads x parts of a group
  int64_t splits;      // blocks that share the keys of a row
  int64_t slots;       // that can ever be filled: k, or all chunks
  bool shared_slots;   // a block keeps them in shared memory

  int64_t workspace_bytes;

  int64_t attend_blocks() const { return rows * splits; }
};

struct DecodeArrays {
  int32_t* positions;       // [B]: of the new token, -1 where there is no room
  uint64_t* centroid_keys;  // [B, R, lists, kept], null without
  uint64_t* keys;           // [B, R, lists, kept] of chunks
  uint32_t* tickets;        // [rows]
  float* partials;          // [rows, splits, partial floats], null for one split
  int32_t* slots;           // [attend_blocks, 2 slots], null if shared
};

CudaDecodePlan plan_decode_cuda(const Shape&, const CudaDecodeFacts&, const CudaDevice&);
DecodeArrays take_decode(const CudaDecodePlan&, const Shape&, Workspace&);

// Of one row and split: peak, total and output of all heads, as the lanes of a team hold them.
int64_t decode_partial_floats(const CudaDecodePlan&);

}  // namespace resona
