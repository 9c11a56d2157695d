// Host twin of csrc/cuda/ptx/cp_async.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline void cp_async_cg_16(void* shared, const void* global, int source_bytes = 16,
                           simt::Site site = simt::Site::here()) {
  simt::copy_async(shared, global, 16, static_cast<size_t>(source_bytes), site);
}

inline void cp_async_ca_8(void* shared, const void* global, int source_bytes = 8,
                          simt::Site site = simt::Site::here()) {
  simt::copy_async(shared, global, 8, static_cast<size_t>(source_bytes), site);
}

inline void cp_async_ca_4(void* shared, const void* global, int source_bytes = 4,
                          simt::Site site = simt::Site::here()) {
  simt::copy_async(shared, global, 4, static_cast<size_t>(source_bytes), site);
}

inline void cp_async_commit_group(simt::Site site = simt::Site::here()) { simt::copy_commit(site); }

template <int kNewer>
inline void cp_async_wait_group(simt::Site site = simt::Site::here()) {
  simt::copy_wait(kNewer, site);
}

inline void cp_async_wait_all(simt::Site site = simt::Site::here()) { simt::copy_wait_all(site); }

}  // namespace resona::cuda::ptx
