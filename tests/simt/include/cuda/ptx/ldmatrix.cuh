// Host twin of csrc/cuda/ptx/ldmatrix.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline void ldmatrix_x1(uint32_t (&x)[1], const void* row, simt::Site site = simt::Site::here()) {
  simt::ldmatrix(x, 1, false, row, site);
}

inline void ldmatrix_x2(uint32_t (&x)[2], const void* row, simt::Site site = simt::Site::here()) {
  simt::ldmatrix(x, 2, false, row, site);
}

inline void ldmatrix_x4(uint32_t (&x)[4], const void* row, simt::Site site = simt::Site::here()) {
  simt::ldmatrix(x, 4, false, row, site);
}

inline void ldmatrix_x1_trans(uint32_t (&x)[1], const void* row, simt::Site site = simt::Site::here()) {
  simt::ldmatrix(x, 1, true, row, site);
}

inline void ldmatrix_x2_trans(uint32_t (&x)[2], const void* row, simt::Site site = simt::Site::here()) {
  simt::ldmatrix(x, 2, true, row, site);
}

inline void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row, simt::Site site = simt::Site::here()) {
  simt::ldmatrix(x, 4, true, row, site);
}

inline void stmatrix_x1(void* row, const uint32_t (&x)[1], simt::Site site = simt::Site::here()) {
  simt::stmatrix(x, 1, false, row, site);
}

inline void stmatrix_x2(void* row, const uint32_t (&x)[2], simt::Site site = simt::Site::here()) {
  simt::stmatrix(x, 2, false, row, site);
}

inline void stmatrix_x4(void* row, const uint32_t (&x)[4], simt::Site site = simt::Site::here()) {
  simt::stmatrix(x, 4, false, row, site);
}

inline void stmatrix_x1_trans(void* row, const uint32_t (&x)[1], simt::Site site = simt::Site::here()) {
  simt::stmatrix(x, 1, true, row, site);
}

inline void stmatrix_x2_trans(void* row, const uint32_t (&x)[2], simt::Site site = simt::Site::here()) {
  simt::stmatrix(x, 2, true, row, site);
}

inline void stmatrix_x4_trans(void* row, const uint32_t (&x)[4], simt::Site site = simt::Site::here()) {
  simt::stmatrix(x, 4, true, row, site);
}

}  // namespace resona::cuda::ptx
