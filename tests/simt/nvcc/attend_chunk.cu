// Every instance of the chunk-stationary attention and its merge, to be looked at as machine code.
#include "cuda/attend_chunk.cuh"
#include "cuda/attend_merge.cuh"

namespace resona::cuda {

#define INSTANTIATE(T, kDim) \
  template __global__ void attend_chunk_kernel<AttendChunkConfig<T, kDim>>(AttendChunkParams<T>);
RESONA_ATTEND_CHUNK_INSTANCES(INSTANTIATE)
#undef INSTANTIATE

#define INSTANTIATE(T, P, kDim) \
  template __global__ void attend_merge_kernel<AttendMergeConfig<T, P, kDim>>(AttendMergeParams<T, P>);
RESONA_ATTEND_MERGE_INSTANCES(INSTANTIATE)

// Of the table in attend_chunk.cuh, what devices with 99 KiB per block use.
static_assert(AttendChunkConfig<BFloat16, 128>::shared_bytes(64, 2, true) <= 99 * 1024);
static_assert(AttendChunkConfig<BFloat16, 256>::shared_bytes(32, 1, true) <= 99 * 1024);
static_assert(AttendChunkConfig<float, 64>::shared_bytes(64, 2, true) <= 99 * 1024);
static_assert(AttendChunkConfig<float, 128>::shared_bytes(32, 1, true) <= 99 * 1024);
static_assert(AttendChunkConfig<float, 256>::shared_bytes(16, 1, false) <= 99 * 1024);

}  // namespace resona::cuda
