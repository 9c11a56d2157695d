// Prefix linear attention as plain data. Letters: B batch, T tokens, M rows of the prefix, H heads, f feature
// dim of queries and keys, V value dim, F = 1 + f + f^2 features, n sequences.
#pragma once

#include "common/problem.h"

namespace resona {

// One sequence; its index in the list is its row of the states.
struct PrefixSequence {
  int64_t batch;
  int64_t token_begin, token_count;    // rows of query, key and value
  int64_t prefix_begin, prefix_count;  // rows of prefix_key and prefix_value
  int64_t mask_begin;                  // element of the mask that belongs to its first token
};

struct PrefixShape {
  int64_t batch, tokens, prefix_rows;     // B, T, M
  int64_t heads, feature_dim, value_dim;  // H, f, V
  int64_t sequences;                      // n

  int64_t features() const { return 1 + feature_dim + feature_dim * feature_dim; }
};

// States are float, or double for float64 inputs.
struct PrefixProblem {
  PrefixShape shape;
  const std::vector<PrefixSequence>* sequences;  // on the CPU
  DeviceSequences packed;                        // on CUDA
  const int32_t* prefix_lengths;                 // on CUDA: [n] on the device, or null
  Rows query, key;                               // [B, T, H, f]
  Rows value;                                    // [B, T, H, V]
  Rows prefix_key, prefix_value;                 // [B, M, H, f] and [B, M, H, V]
  const uint8_t* mask;                           // [B, T] zero: padding; or null
  const void* initial_state;                     // [n, H, F, V], or null
  const void* initial_normalizer;                // [n, H, F], or null
  double scale;                                  // factor of <query, key>, positive
  MutableRows out;                               // [B, T, H, V]
  void* state;                                   // [n, H, F, V]
  void* normalizer;                              // [n, H, F]
};

struct PrefixBackwardProblem {
  PrefixProblem forward;                                       // `out` holds the result of the forward pass
  Rows out_gradient;                                           // [B, T, H, V]
  const void *state_gradient, *normalizer_gradient;            // like the states, or null
  MutableRows query_gradient, key_gradient;                    // [B, T, H, f]
  MutableRows value_gradient;                                  // [B, T, H, V]
  MutableRows prefix_key_gradient;                             // [B, M, H, f], zero on entry to the CPU
  MutableRows prefix_value_gradient;                           // [B, M, H, V], zero on entry to the CPU
  void *initial_state_gradient, *initial_normalizer_gradient;  // or null
};

// One token per sequence, B = n and T = 1.
struct PrefixStepProblem {
  PrefixShape shape;
  Rows query, key, value;
  const uint8_t* mask;  // [B] zero: no token, the state stays; or null
  double scale;
  MutableRows out;
  void *state, *normalizer;  // updated in place
};

}  // namespace resona
