// What a block of attend_backward.cuh keeps in shared memory, and how its warps share the work.
#pragma once

#include "cuda/attend_backward_params.cuh"

namespace resona::cuda {

// Of a tile of rows. A row that does not exist, or has no weight in this chunk, has token -1.
template <int kTile>
struct RowTable {
  int32_t token[kTile];
  float shift[kTile], factor[kTile], delta[kTile];
};

// Views of the dynamic shared memory.
template <class Config>
struct BackwardStorage {
  using Rows = typename Config::Rows;
  using Weights = typename Config::Weights;
  using Table = RowTable<Config::kTile>;
  unsigned char* memory;
  static_assert(sizeof(BackwardItem) <= Config::kItemBytes && sizeof(Table) == Config::kRowTableBytes);

  __device__ __forceinline__ BackwardItem& item() const { return *reinterpret_cast<BackwardItem*>(memory); }
  // Queries of the item. Read ahead: else each tile would wait for them before it can ask for their lse.
  __device__ __forceinline__ uint32_t* list() const {
    return reinterpret_cast<uint32_t*>(memory + Config::kItemBytes);
  }
  // Of the tile of rows that begins there; the next one has the other.
  __device__ __forceinline__ Table& table(int first_row) const {
    return reinterpret_cast<Table*>(memory + kBeforeTables)[first_row / Config::kTile % 2];
  }
  // Sums of the rows over each half of the keys.
  __device__ __forceinline__ float* sums(int half) const {
    return reinterpret_cast<float*>(memory + kBeforeTables + 2 * sizeof(Table)) + half * Config::kTile;
  }
  __device__ __forceinline__ Rows key() const { return tensor(0); }
  __device__ __forceinline__ Rows value() const { return tensor(1); }
  __device__ __forceinline__ Rows query() const { return tensor(2); }
  __device__ __forceinline__ Rows out_gradient() const { return tensor(3); }
  __device__ __forceinline__ Weights weight() const { return weights(0); }
  __device__ __forceinline__ Weights logit_gradient() const { return weights(1); }

 private:
  static constexpr int kBeforeTables = Config::kItemBytes + Config::kListBytes;

  __device__ __forceinline__ Rows tensor(int i) const {
    return {memory + Config::kTableBytes + i * Config::kTensorBytes};
  }
  __device__ __forceinline__ Weights weights(int i) const {
    return {memory + Config::kTableBytes + 4 * Config::kTensorBytes + i * Config::kWeightBytes};
  }
};

// What a thread knows of its row and tile of keys: where the block stands.
struct BackwardStep {
  int first_row;  // of the item
  int rows;       // of the tile
  int first_key, keys;
};

// A warp's part of the products: 16 rows of the result, and half of what they are as wide as.
struct WarpPart {
  int row, half, lane;
};

// What follows from the thread's number is added to a zero from shared memory: the compiler cannot know that
// it stays zero over a barrier, and computes addresses where they are needed. It would keep some 50 in
// registers from step to step, and spill.
template <class Config>
__device__ __forceinline__ int own_thread(const BackwardStorage<Config>& storage) {
  return static_cast<int>(threadIdx.x) + storage.item().zero;
}

// Where result rows are rows of queries. Chunks of at most half a tile leave one half without work; warps
// that have some stand in all four parts of the SM.
template <class Config>
__device__ __forceinline__ WarpPart part_of_rows(const BackwardStorage<Config>& storage) {
  constexpr int kGroups = Config::kTile / 16;
  const int thread = own_thread(storage), warp = thread / kWarpSize;
  return {warp % kGroups * 16, warp / kGroups, thread % kWarpSize};
}

// Where they are keys.
template <class Config>
__device__ __forceinline__ WarpPart part_of_keys(const BackwardStorage<Config>& storage) {
  const int thread = own_thread(storage), warp = thread / kWarpSize;
  return {warp / 2 * 16, warp % 2, thread % kWarpSize};
}

}  // namespace resona::cuda
