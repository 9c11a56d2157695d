#pragma once

// Functions shared by host and device code. They are `static`: every translation unit keeps its own
// copy, so a copy compiled for a wider instruction set never replaces a portable one at link time.
#if defined(__CUDACC__)
#define RESONA_HD __host__ __device__ static inline
#else
#define RESONA_HD static inline
#endif
