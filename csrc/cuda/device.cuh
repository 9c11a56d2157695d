// What every kernel file includes first. The simulator (tests/simt) has a file of the same name, found
// before this one, that supplies CUDA's built-in names on the host; so kernels include no CUDA header.
#pragma once

#include <cstdint>

// A block's static shared memory: one struct per kernel, left uninitialised.
#define RESONA_SHARED(Type, name) __shared__ Type name

// The dynamic part, `unsigned char name[]`, aligned for cp.async, ldmatrix and swizzles of 128 bytes.
#define RESONA_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace resona::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace resona::cuda
