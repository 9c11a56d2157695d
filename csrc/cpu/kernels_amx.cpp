// The float kernels of this set are those of avx512.
#define RESONA_TILES amx_tiles
#define RESONA_PRODUCTS "cpu/micro/tile_gemm.h"
#include "cpu/micro/tile_set.inc"
