// Host twin of csrc/cuda/ptx/mma.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              simt::Site site = simt::Site::here()) {
  simt::mma(simt::Multiply::kBFloat16, c, a, b, site);
}

inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Site site = simt::Site::here()) {
  simt::mma(simt::Multiply::kHalf, c, a, b, site);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Site site = simt::Site::here()) {
  simt::mma(simt::Multiply::kTF32, c, a, b, site);
}

}  // namespace resona::cuda::ptx
