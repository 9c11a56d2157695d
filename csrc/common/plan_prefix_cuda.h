// The plan of prefix linear attention on CUDA. csrc/cuda/prefix.cu and prefix_backward.cu tell the sequence
// of launches.
//
// A block takes a sequence and head, tile after tile. Where these are too few for the device, dense sequences
// are cut into pieces: first their sums, then a scan in order, then the sweeps. Packed sequences, whose
// lengths the host does not know, are not cut. Everything depends on the shape and the device alone.
#pragma once

#include "common/plan_cuda.h"
#include "common/prefix_layout.h"
#include "common/prefix_problem.h"

namespace resona {

constexpr int64_t kPrefixThreads = 256;

struct CudaPrefixFacts {
  bool packed;
  bool vector_rows;  // queries and keys are rows_of_16_bytes, values and what goes with them too
};

struct CudaPrefixPlan {
  const char* kernel;
  const char* reason;
  PrefixLayout layout;
  bool vector_rows, vector_values;  // 16-byte loads
  int64_t batch;                    // entries per part: the parts run one after another, in one workspace
  int64_t segment;                  // tokens of a piece
  int64_t token_pieces, prefix_pieces;
  int64_t shared_bytes;
  int64_t launches;  // of a part
  int64_t workspace_bytes;

  bool is_cut() const { return token_pieces > 1; }
  int64_t pieces() const { return is_cut() ? token_pieces + prefix_pieces : 0; }
};

// Of a part.
struct PrefixArrays {
  float* slots;    // [lanes, slices, pieces, state], null where nothing is cut: a lane is a sequence and head
  float* inverse;  // backward: [batch, H, T], 1 / denominator
  float* denominator_gradient;                             // [batch, H, T]
  float *query_partials, *key_partials, *prefix_partials;  // [slices, batch, T or M, H, f], null for 1 slice
};

CudaPrefixPlan plan_prefix_cuda(const PrefixShape&, const CudaPrefixFacts&, const CudaDevice&);
CudaPrefixPlan plan_prefix_backward_cuda(const PrefixShape&, const CudaPrefixFacts&, const CudaDevice&);

PrefixArrays take_prefix(const CudaPrefixPlan&, const PrefixShape&, Workspace&);
PrefixArrays take_prefix_backward(const CudaPrefixPlan&, const PrefixShape&, Workspace&);

}  // namespace resona
