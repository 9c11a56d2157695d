// Plans of the CUDA stages: pure functions of the shape, of a few facts about the tensors and of a
// description of the device. Like all plans they need no CUDA, so they are printed and tested anywhere.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/cuda_tuning.h"
#include "common/problem.h"
#include "common/workspace.h"

namespace resona {

struct CudaDevice {
  int64_t sms;           // multiprocessors
  int64_t capability;    // 10 major + minor
  int64_t shared_bytes;  // that a block may opt in to
  CudaTuning tuning = {};
};

// A device of that capability, for plans without one at hand.
CudaDevice typical_cuda_device(int64_t capability, int64_t sms);

// What plans count with; the .cu files assert that the kernels agree.
constexpr int64_t kElementsPerLane = 8;  // of kernels that choose the lanes of a row
constexpr int64_t kPoolRowsPerBlock = 16;
constexpr int64_t kRetrieveBackwardThreads = 128;
constexpr int64_t kIndexThreads = 256, kIndexTile = 4096, kIndexDigitBits = 11, kScanTile = 2048;
constexpr int64_t kIndexTileQueries = 128, kIndexCountsPerLoad = 8;  // of the quick index
constexpr int64_t kIndexMostKeys = 4096, kIndexMostTopK = 511, kIndexMostBlockTiles = 16;

// What a call may take for scratch. Larger problems are worked off in parts, as far as they have any.
constexpr int64_t kCudaWorkspaceBytes = 512 << 20;

// Of sizes that no tensor could have, just a very large number: products of two of these still fit.
int64_t saturated_product(std::initializer_list<int64_t> factors);

// The largest n in [1, most] that fits, given that all smaller ones do; 1 if none does.
template <class Fits>
int64_t largest_that_fits(int64_t most, const Fits& fits) {
  if (fits(most)) return most;
  int64_t low = 1, high = most;
  while (low + 1 < high) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

// Whether each row begins and ends at a multiple of 16 bytes, so that it can be moved 16 bytes at a time.
bool rows_of_16_bytes(const Rows&, int64_t dim);
bool rows_of_16_bytes(const MutableRows&, int64_t dim);

// What plans learn about the tensors of a stage.
struct CudaFacts {
  static constexpr int64_t kNotPacked = -1;
  bool vector_rows;   // the rows of all of them are rows_of_16_bytes
  int64_t sequences;  // of a packed batch, or kNotPacked
};

CudaFacts cuda_facts(bool vector_rows, const DeviceSequences&);

// Which chunk rows are whose: [sequences + 1], or null where they are not packed.
int32_t* take_chunk_begin(int64_t sequences, Workspace&);

// ---- pool

struct CudaPoolPlan {
  const char* kernel;
  const char* reason;
  int64_t lanes;  // that sum one row
  bool vector;    // 16-byte loads
  int64_t blocks;
  int64_t sequences;  // as in CudaFacts
  int64_t workspace_bytes;
};

CudaPoolPlan plan_pool_cuda(const Shape&, const CudaFacts&, const CudaDevice&);
inline int64_t launches_of(const CudaPoolPlan& plan) { return plan.blocks > 0 ? 1 : 0; }
CudaPoolPlan plan_pool_backward_cuda(const Shape&, const CudaFacts&, const CudaDevice&);

// ---- index: the queries of each chunk, for the stages that work chunk by chunk

struct CudaIndexPlan {
  const char* kernel;
  const char* reason;
  int64_t slots, keys;  // B T R k; B R C, each with a list

  // Few keys: slots are counted per tile of 128 queries of a batch entry and retrieval head, then placed.
  bool quick;
  int64_t query_tiles, count_pitch;  // of the counts [query_tiles, count_pitch]: C rounded up to 8
  int64_t block_tiles, blocks, shared_bytes;

  // Any number of keys: a sort.
  int64_t passes, digit_bits;
  int64_t tiles;                    // of slots
  int64_t slot_blocks, key_blocks;  // grids of the kernels that take one slot or key at a time

  int64_t workspace_bytes;
};

CudaIndexPlan plan_index_cuda(const Shape&, const CudaDevice&);

// With the lists.
int64_t launches_of(const CudaIndexPlan&);

// Whatever the number of keys; plan_index_cuda takes it where the quick index does not reach.
CudaIndexPlan plan_index_sort_cuda(const Shape&, const CudaDevice&);

// Where the index and its scratch lie in a workspace. The results of a sort take the place of scratch that is
// done with.
struct IndexArrays {
  uint32_t *keys[2], *slots[2];  // of a sort, before and after a pass, [slots]
  uint32_t *counts, *totals;     // of a pass, and of their scan
  int64_t count_entries;
  uint16_t* tile_counts;                         // of the quick index, [query_tiles, count_pitch]
  uint32_t* sorted_slots;                        // [slots], list after list
  uint32_t* list;                                // [slots]: query row of each position
  int32_t* position;                             // [slots]: of each slot, -1 where it is unused
  uint32_t *offsets, *tile_begin, *tile_totals;  // [keys + 1], [keys + 1], of the scan of tile_begin
};

IndexArrays take_index(const CudaIndexPlan&, Workspace&);

// ---- gradients of retrieve

struct CudaRetrieveBackwardPlan {
  const char* kernel;
  const char* reason;
  int64_t batch;                  // entries per part: the parts run one after another, in the same workspace
  int64_t lanes;                  // that work on one row
  bool vector;                    // 16-byte loads
  int64_t segment, partial_rows;  // slots of a list that one warp sums, and the sums of long lists
  int64_t query_blocks, segment_blocks, chunk_blocks;
  CudaIndexPlan index, last_index;  // of a part; of the last, which may be smaller
  int64_t sequences;                // as in CudaFacts
  int64_t workspace_bytes;
};

struct RetrieveBackwardArrays {
  int32_t* chunk_begin;  // of packed sequences, else null
  float* factors;        // [slots]
  float* partials;       // [partial_rows, E rounded up to 8]
};

CudaRetrieveBackwardPlan plan_retrieve_backward_cuda(const Shape&, const CudaFacts&, const CudaDevice&);
RetrieveBackwardArrays take_retrieve_backward(const CudaRetrieveBackwardPlan&, const Shape&, Workspace&);

}  // namespace resona
