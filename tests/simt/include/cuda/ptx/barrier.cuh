// Host twin of csrc/cuda/ptx/barrier.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline void barrier_sync(unsigned id, unsigned threads, simt::Site site = simt::Site::here()) {
  simt::barrier("barrier_sync", id, threads, true, 0, site);
}

inline void barrier_arrive(unsigned id, unsigned threads, simt::Site site = simt::Site::here()) {
  simt::barrier("barrier_arrive", id, threads, false, 0, site);
}

}  // namespace resona::cuda::ptx
