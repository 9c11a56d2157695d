// The float kernels of this set are those of avx512.
#define RESONA_TILES avx512_bf16_tiles
#define RESONA_PRODUCTS "cpu/micro/dot_gemm.h"
#include "cpu/micro/tile_set.inc"
