// Host twin of csrc/cuda/ptx/memory.cuh.
#pragma once

#include "cuda/device.cuh"

namespace resona::cuda::ptx {

inline uint4 ld_global_no_allocate_v4(const void* from, simt::Site site = simt::Site::here()) {
  uint4 x;
  simt::load("ld_global_no_allocate_v4", &x, from, sizeof x, site);
  return x;
}

inline uint4 ld_global_v4(const void* from, simt::Site site = simt::Site::here()) {
  uint4 x;
  simt::load("ld_global_v4", &x, from, sizeof x, site);
  return x;
}

inline void st_global_v4(void* to, uint4 x, simt::Site site = simt::Site::here()) {
  simt::store("st_global_v4", to, &x, sizeof x, site);
}

inline uint32_t ld_acquire_gpu(const uint32_t* from, simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic_load("ld_acquire_gpu", from, sizeof *from, simt::Order::kAcquire,
                                                 simt::Scope::kDevice, site));
}

inline uint32_t ld_relaxed_gpu(const uint32_t* from, simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic_load("ld_relaxed_gpu", from, sizeof *from, simt::Order::kRelaxed,
                                                 simt::Scope::kDevice, site));
}

inline void st_release_gpu(uint32_t* to, uint32_t x, simt::Site site = simt::Site::here()) {
  simt::atomic_store("st_release_gpu", to, sizeof x, x, simt::Order::kRelease, simt::Scope::kDevice, site);
}

inline void st_relaxed_gpu(uint32_t* to, uint32_t x, simt::Site site = simt::Site::here()) {
  simt::atomic_store("st_relaxed_gpu", to, sizeof x, x, simt::Order::kRelaxed, simt::Scope::kDevice, site);
}

inline uint32_t atom_add_relaxed_cta(uint32_t* at, uint32_t x, simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic("atom_add_relaxed_cta", simt::Atomic::kAdd, at, sizeof x, x, 0,
                                            simt::Order::kRelaxed, simt::Scope::kBlock, site));
}

inline uint32_t atom_add_relaxed_gpu(uint32_t* at, uint32_t x, simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic("atom_add_relaxed_gpu", simt::Atomic::kAdd, at, sizeof x, x, 0,
                                            simt::Order::kRelaxed, simt::Scope::kDevice, site));
}

inline uint32_t atom_add_acq_rel_gpu(uint32_t* at, uint32_t x, simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic("atom_add_acq_rel_gpu", simt::Atomic::kAdd, at, sizeof x, x, 0,
                                            simt::Order::kAcquireRelease, simt::Scope::kDevice, site));
}

inline uint32_t atom_max_relaxed_gpu(uint32_t* at, uint32_t x, simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic("atom_max_relaxed_gpu", simt::Atomic::kMax, at, sizeof x, x, 0,
                                            simt::Order::kRelaxed, simt::Scope::kDevice, site));
}

inline uint32_t atom_exch_relaxed_gpu(uint32_t* at, uint32_t x, simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic("atom_exch_relaxed_gpu", simt::Atomic::kExchange, at, sizeof x, x,
                                            0, simt::Order::kRelaxed, simt::Scope::kDevice, site));
}

inline uint32_t atom_cas_acq_rel_gpu(uint32_t* at, uint32_t compare, uint32_t x,
                                     simt::Site site = simt::Site::here()) {
  return static_cast<uint32_t>(simt::atomic("atom_cas_acq_rel_gpu", simt::Atomic::kCompareSwap, at, sizeof x,
                                            x, compare, simt::Order::kAcquireRelease, simt::Scope::kDevice,
                                            site));
}

inline float atom_add_relaxed_gpu(float* at, float x, simt::Site site = simt::Site::here()) {
  const uint64_t old = simt::atomic("atom_add_relaxed_gpu", simt::Atomic::kAddFloat, at, sizeof x,
                                    __float_as_uint(x), 0, simt::Order::kRelaxed, simt::Scope::kDevice, site);
  return __uint_as_float(static_cast<uint32_t>(old));
}

}  // namespace resona::cuda::ptx
