// Every function of csrc/cuda/ptx once, so that ptxas sees each instruction on each architecture.
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ex2.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/movmatrix.cuh"

namespace resona::cuda {

__global__ void instructions_kernel(uint32_t* out, const uint4* in, float* sums, float x) {
  RESONA_DYNAMIC_SHARED(memory);
  ptx::griddepcontrol_wait();
  ptx::barrier_arrive(1, 64);
  ptx::barrier_sync(1, 64);
  ptx::cp_async_cg_16(memory, in);
  ptx::cp_async_ca_8(memory + 16, in);
  ptx::cp_async_ca_4(memory + 32, in);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();
  ptx::cp_async_wait_all();
  uint32_t one[1], two[2], four[4];
  ptx::ldmatrix_x1(one, memory);
  ptx::ldmatrix_x2(two, memory);
  ptx::ldmatrix_x4(four, memory);
  ptx::ldmatrix_x1_trans(one, memory + one[0]);
  ptx::ldmatrix_x2_trans(two, memory + two[0]);
  ptx::ldmatrix_x4_trans(four, memory + four[0]);
#if __CUDA_ARCH__ >= 900
  ptx::stmatrix_x1(memory, one);
  ptx::stmatrix_x2(memory, two);
  ptx::stmatrix_x4(memory, four);
  ptx::stmatrix_x1_trans(memory, one);
  ptx::stmatrix_x2_trans(memory, two);
  ptx::stmatrix_x4_trans(memory, four);
#endif
  two[0] = ptx::movmatrix_trans(two[0]);
  float c[4] = {x, x, x, x};
  ptx::mma_m16n8k16_bf16(c, four, two);
  ptx::mma_m16n8k16_f16(c, four, two);
  ptx::mma_m16n8k8_tf32(c, four, two);
  uint32_t sum = ptx::cvt_rn_f16_f32(c[0]) + ptx::cvt_rn_bf16_f32(c[1]);
  sum += ptx::cvt_rn_f16x2_f32(c[2], c[3]) + ptx::cvt_rn_bf16x2_f32(c[2], c[3]) + ptx::cvt_rna_tf32_f32(x);
  const uint16_t half = static_cast<uint16_t>(sum);
  sums[1] = ptx::cvt_f32_f16(half) + ptx::cvt_f32_bf16(half) + ptx::atom_add_relaxed_gpu(sums, x);
  sums[2] = ptx::ex2_approx_ftz_f32(x);
  sum += ptx::ld_acquire_gpu(out) + ptx::ld_relaxed_gpu(out + 1);
  sum += ptx::atom_add_relaxed_cta(out, 1) + ptx::atom_add_relaxed_gpu(out, 1);
  sum += ptx::atom_add_acq_rel_gpu(out, 1) + ptx::atom_max_relaxed_gpu(out, sum);
  sum += ptx::atom_exch_relaxed_gpu(out, sum) + ptx::atom_cas_acq_rel_gpu(out, 1, sum);
  ptx::st_relaxed_gpu(out + 2, sum);
  ptx::st_release_gpu(out + 3, sum);
  ptx::st_global_v4(out + 4, ptx::ld_global_no_allocate_v4(in));
  ptx::st_global_v4(out + 8, ptx::ld_global_v4(in));
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace resona::cuda
