// The numbers by which plans choose between kernels and size their grids. They decide how fast a call is,
// never what it computes. None has been measured on a GPU: they follow from the bytes that each path moves.
// `python -m benchmarks.kernels.tune` sweeps them on a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace resona {

struct CudaTuning {
  int64_t dense_context = 8192;  // longest of the dense path: beyond, it loses at any density it can have
  int64_t dense_percent = 20;    // of a row's past that it must select, at the middle of the context
  int64_t chunk_tokens = 8;      // shortest chunk of the chunk path: others leave most of a 16-key tile empty
  int64_t chunk_rows = 16;       // of a list on average: with fewer, keys are loaded for too few rows
  int64_t item_rows = 512;       // most rows that meet a chunk in one go
  int64_t lane_rows = 64;        // of a list on average, above which tiles of the backward are full enough
  int64_t search_splits = 8;     // most blocks that share the chunks of a tile of queries
  int64_t search_finish = 4;     // what it costs to finish the candidates of one more split, in steps
  int64_t attended_keys = 4;     // of a row, at most, for the search to attend to it
  int64_t attended_tiles = 2;    // of queries per multiprocessor, at least, for that
  // Blocks per multiprocessor: several times what fits at once, so that blocks of unequal length even out.
  int64_t pool_blocks = 40, index_blocks = 8, query_blocks = 16, chunk_blocks = 3, merge_blocks = 16;
  int64_t backward_item_blocks = 16, backward_row_blocks = 32, retrieve_backward_blocks = 32;
  int64_t decode_blocks = 2;
};

struct TuningField {
  const char* name;
  int64_t CudaTuning::* value;
  int64_t least, most;  // what the kernels can take
};

const std::vector<TuningField>& tuning_fields();

// Null for a name that there is not.
const TuningField* find_tuning_field(const std::string& name);

}  // namespace resona
