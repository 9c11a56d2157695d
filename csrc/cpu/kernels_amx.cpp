// The float kernels of this set are those of avx512.
#include <immintrin.h>

#include "cpu/tile_kernels.h"

namespace resona::cpu {
namespace {

#include "cpu/micro/tile_gemm.h"

#include "cpu/micro/tile_pack.h"

#include "cpu/micro/tile_attend.h"
#include "cpu/micro/tile_softmax_backward.h"

}  // namespace

const TileKernels amx_tiles = {
    tiles_begin,  tiles_end, tile_gemm, pack_transposed, pack_rows, tile_attend, softmax_backward_columns,
    store_scaled,
};

}  // namespace resona::cpu
