// The kernels of index_quick.cuh, index_sort.cuh and scan.cuh, to be looked at as machine code.
#include "cuda/index_quick.cuh"
#include "cuda/index_sort.cuh"

namespace resona::cuda {

extern const void* const index_kernels[];
const void* const index_kernels[] = {reinterpret_cast<const void*>(index_tile_counts_kernel),
                                     reinterpret_cast<const void*>(index_place_kernel),
                                     reinterpret_cast<const void*>(index_keys_kernel),
                                     reinterpret_cast<const void*>(index_count_kernel),
                                     reinterpret_cast<const void*>(index_scatter_kernel),
                                     reinterpret_cast<const void*>(index_lists_kernel),
                                     reinterpret_cast<const void*>(index_offsets_kernel),
                                     reinterpret_cast<const void*>(scan_tiles_kernel),
                                     reinterpret_cast<const void*>(scan_totals_kernel)};

}  // namespace resona::cuda
