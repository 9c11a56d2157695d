#include "common/cuda_tuning.h"

namespace resona {

const std::vector<TuningField>& tuning_fields() {
  using T = CudaTuning;
  constexpr int64_t kBlocks = 1 << 10, kAny = int64_t{1} << 40;
  static const std::vector<TuningField> fields = {
      {"dense_context", &T::dense_context, 0, kAny},
      {"dense_percent", &T::dense_percent, 0, 200},
      {"chunk_tokens", &T::chunk_tokens, 1, kAny},
      {"chunk_rows", &T::chunk_rows, 0, kAny},
      {"item_rows", &T::item_rows, 64, 512},
      {"lane_rows", &T::lane_rows, 0, kAny},
      {"search_splits", &T::search_splits, 1, 16},
      {"search_finish", &T::search_finish, 0, kAny},
      {"attended_keys", &T::attended_keys, 0, kAny},
      {"attended_tiles", &T::attended_tiles, 0, kBlocks},
      {"pool_blocks", &T::pool_blocks, 1, kBlocks},
      {"index_blocks", &T::index_blocks, 1, kBlocks},
      {"query_blocks", &T::query_blocks, 1, kBlocks},
      {"chunk_blocks", &T::chunk_blocks, 1, kBlocks},
      {"merge_blocks", &T::merge_blocks, 1, kBlocks},
      {"backward_item_blocks", &T::backward_item_blocks, 1, kBlocks},
      {"backward_row_blocks", &T::backward_row_blocks, 1, kBlocks},
      {"retrieve_backward_blocks", &T::retrieve_backward_blocks, 1, kBlocks},
      {"decode_blocks", &T::decode_blocks, 1, kBlocks},
  };
  return fields;
}

const TuningField* find_tuning_field(const std::string& name) {
  for (const TuningField& field : tuning_fields())
    if (field.name == name) return &field;
  return nullptr;
}

}  // namespace resona
