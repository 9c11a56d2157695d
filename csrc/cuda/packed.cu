#include "cuda/packed.cuh"

#include "cuda/launch.cuh"

namespace resona::cuda {

PackedSequences find_chunks(const DeviceSequences& s, const Shape& shape, int32_t* chunk_begin,
                            Stream stream) {
  if (s.cu_seqlens != nullptr)
    launch({"chunk_offsets_kernel", {1}, ChunkOffsetsConfig::kThreads}, stream, chunk_offsets_kernel,
           ChunkOffsetsParams{s.cu_seqlens, chunk_begin, s.count, shape.context, shape.chunk_size});
  return {s.cu_seqlens, chunk_begin, s.count};
}

}  // namespace resona::cuda
