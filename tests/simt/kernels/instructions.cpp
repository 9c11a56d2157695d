// Every host twin on its own, so that tests can compare it with its definition.
#include "cuda/device.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ex2.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/movmatrix.cuh"
#include "runtime/arguments.h"

namespace {

using namespace resona::cuda;

struct alignas(16) Rows {
  uint16_t at[32][8];
};

// Matrices [n][8][8] in, registers [32 lanes][n] out.
template <int kMatrices>
__global__ void load_matrices(const uint16_t* in, uint32_t* out, bool transposed) {
  RESONA_SHARED(Rows, rows);
  const int lane = threadIdx.x;
  for (int c = 0; c < 8; ++c) rows.at[lane][c] = lane < 8 * kMatrices ? in[8 * lane + c] : 0;
  __syncwarp();
  uint32_t x[kMatrices];
  if constexpr (kMatrices == 1)
    transposed ? ptx::ldmatrix_x1_trans(x, rows.at[lane]) : ptx::ldmatrix_x1(x, rows.at[lane]);
  if constexpr (kMatrices == 2)
    transposed ? ptx::ldmatrix_x2_trans(x, rows.at[lane]) : ptx::ldmatrix_x2(x, rows.at[lane]);
  if constexpr (kMatrices == 4)
    transposed ? ptx::ldmatrix_x4_trans(x, rows.at[lane]) : ptx::ldmatrix_x4(x, rows.at[lane]);
  for (int m = 0; m < kMatrices; ++m) out[kMatrices * lane + m] = x[m];
}

// The other way round.
template <int kMatrices>
__global__ void store_matrices(const uint32_t* in, uint16_t* out, bool transposed) {
  RESONA_SHARED(Rows, rows);
  const int lane = threadIdx.x;
  uint32_t x[kMatrices];
  for (int m = 0; m < kMatrices; ++m) x[m] = in[kMatrices * lane + m];
  if constexpr (kMatrices == 1)
    transposed ? ptx::stmatrix_x1_trans(rows.at[lane], x) : ptx::stmatrix_x1(rows.at[lane], x);
  if constexpr (kMatrices == 2)
    transposed ? ptx::stmatrix_x2_trans(rows.at[lane], x) : ptx::stmatrix_x2(rows.at[lane], x);
  if constexpr (kMatrices == 4)
    transposed ? ptx::stmatrix_x4_trans(rows.at[lane], x) : ptx::stmatrix_x4(rows.at[lane], x);
  __syncwarp();
  if (lane < 8 * kMatrices)
    for (int c = 0; c < 8; ++c) out[8 * lane + c] = rows.at[lane][c];
}

__global__ void transpose_matrix(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = ptx::movmatrix_trans(in[threadIdx.x]);
}

// c [16][8] += a [16][16] b [16][8], 16-bit operands through ldmatrix as kernels load them: a by rows,
// b by rows and transposed on the way.
template <bool kHalf>
__global__ void multiply_16(const uint16_t* a, const uint16_t* b, float* c) {
  RESONA_SHARED(Rows, a_rows);
  RESONA_SHARED(Rows, b_rows);
  const int lane = threadIdx.x;
  for (int e = 0; e < 8; ++e) {  // row lane % 16, columns 8 (lane / 16) + e
    a_rows.at[lane][e] = a[16 * (lane % 16) + 8 * (lane / 16) + e];
    b_rows.at[lane][e] = lane < 16 ? b[8 * lane + e] : 0;
  }
  __syncwarp();
  uint32_t x[4], y[2];
  ptx::ldmatrix_x4(x, a_rows.at[lane]);
  ptx::ldmatrix_x2_trans(y, b_rows.at[lane]);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2];
  if constexpr (kHalf)
    ptx::mma_m16n8k16_f16(sum, x, y);
  else
    ptx::mma_m16n8k16_bf16(sum, x, y);
  for (int i = 0; i < 4; ++i) c[8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2] = sum[i];
}

// c [16][8] += a [16][8] b [8][8]
__global__ void multiply_tf32(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float a_values[4] = {a[8 * g + t], a[8 * (g + 8) + t], a[8 * g + t + 4], a[8 * (g + 8) + t + 4]};
  const float b_values[2] = {b[8 * t + g], b[8 * (t + 4) + g]};
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i) x[i] = ptx::cvt_rna_tf32_f32(a_values[i]);
  for (int i = 0; i < 2; ++i) y[i] = ptx::cvt_rna_tf32_f32(b_values[i]);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[8 * (g + 8 * (i / 2)) + 2 * t + i % 2];
  ptx::mma_m16n8k8_tf32(sum, x, y);
  for (int i = 0; i < 4; ++i) c[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = sum[i];
}

// One row of results per operation, for tests/simt/test_simt_instructions.py.
__global__ void warp_operations(const int32_t* in, int32_t* out) {
  const int lane = threadIdx.x, x = in[lane];
  const unsigned u = static_cast<unsigned>(x), odd = 0xaaaaaaaau;
  int row = 0;
  const auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(kAllLanes, x, 5));
  put(__shfl_sync(kAllLanes, x, lane + 3, 8));
  put(__shfl_up_sync(kAllLanes, x, 3));
  put(__shfl_down_sync(kAllLanes, x, 3, 16));
  put(__shfl_xor_sync(kAllLanes, x, 9));
  put(static_cast<int>(__ballot_sync(kAllLanes, x > 0)));
  put(__any_sync(kAllLanes, x > 1000));
  put(__all_sync(kAllLanes, x > -1000));
  put(static_cast<int>(__match_any_sync(kAllLanes, x % 3)));
  put(__reduce_add_sync(kAllLanes, x));
  put(__reduce_min_sync(kAllLanes, x));
  put(static_cast<int>(__reduce_max_sync(kAllLanes, u)));
  put(static_cast<int>(__reduce_xor_sync(kAllLanes, u)));
  put(lane % 2 ? __reduce_max_sync(odd, x) : __reduce_max_sync(~odd, x));
}

// Producer warp, consumer warp, two named barriers; ragged rows are zero-filled.
struct alignas(16) Stage {
  uint32_t at[32 * 4];
};

__global__ void pipeline(const uint32_t* in, uint32_t* out, int tiles, int count) {
  RESONA_SHARED(Stage, stage);
  const int lane = threadIdx.x % 32;
  for (int tile = 0; tile < tiles; ++tile) {
    if (threadIdx.x < 32) {
      if (tile > 0) ptx::barrier_sync(2, 64);  // the stage is free again
      const int first = 128 * tile + 4 * lane, left = 4 * (count - first);
      const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
      ptx::cp_async_cg_16(stage.at + 4 * lane, in + (bytes ? first : 0), bytes);
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      ptx::barrier_arrive(1, 64);
    } else {
      ptx::barrier_sync(1, 64);
      for (int i = 0; i < 4; ++i) out[128 * tile + 32 * i + lane] = stage.at[32 * i + lane];
      if (tile + 1 < tiles) ptx::barrier_arrive(2, 64);
    }
  }
}

// Small copies and dynamic shared memory.
__global__ void small_copies(const uint32_t* in, uint32_t* out) {
  RESONA_DYNAMIC_SHARED(memory);
  uint32_t* tile = reinterpret_cast<uint32_t*>(memory);
  const int lane = threadIdx.x;
  ptx::cp_async_ca_8(tile + 2 * lane, in + 2 * lane);
  ptx::cp_async_ca_4(tile + 64 + lane, in + 64 + lane, lane < 30 ? 4 : 0);
  ptx::cp_async_wait_all();
  __syncthreads();
  for (int i = 0; i < 3; ++i) out[32 * i + lane] = tile[95 - 32 * i - lane];
}

__global__ void barrier_votes(const int32_t* in, int32_t* out) {
  const int t = threadIdx.x, n = blockDim.x;
  out[t] = __syncthreads_count(in[t] > 0);
  out[n + t] = __syncthreads_or(in[t] > 5);
  out[2 * n + t] = __syncthreads_and(in[t] > -100);
}

// Bits in, bits out.
__global__ void convert(const uint32_t* in, uint32_t* out, int count, int what) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t x = in[i];
    const float f = __uint_as_float(x);
    const uint16_t h = static_cast<uint16_t>(x);
    out[i] = what == 0   ? __float_as_uint(ptx::cvt_f32_f16(h))
             : what == 1 ? __float_as_uint(ptx::cvt_f32_bf16(h))
             : what == 2 ? ptx::cvt_rn_f16_f32(f)
             : what == 3 ? ptx::cvt_rn_bf16_f32(f)
             : what == 4 ? ptx::cvt_rna_tf32_f32(f)
             : what == 5 ? ptx::cvt_rn_f16x2_f32(f, -f)
             : what == 6 ? ptx::cvt_rn_bf16x2_f32(f, -f)
                         : __float_as_uint(ptx::ex2_approx_ftz_f32(f));
  }
}

template <int kMatrices>
void launch_matrices(const simt::Arguments& a, bool store) {
  const bool transposed = a.integer("transposed") != 0;
  if (store) {
    const auto in = a.array<uint32_t>("in");
    const auto out = a.array<uint16_t>("out");
    simt::launch({"store_matrices", 1, 32}, [=] { store_matrices<kMatrices>(in, out, transposed); });
  } else {
    const auto in = a.array<uint16_t>("in");
    const auto out = a.array<uint32_t>("out");
    simt::launch({"load_matrices", 1, 32}, [=] { load_matrices<kMatrices>(in, out, transposed); });
  }
}

void run_matrices(const simt::Arguments& a) {
  const bool store = a.integer("store") != 0;
  const int64_t matrices = a.integer("matrices");
  if (matrices == 1) launch_matrices<1>(a, store);
  if (matrices == 2) launch_matrices<2>(a, store);
  if (matrices == 4) launch_matrices<4>(a, store);
}

void run_transpose(const simt::Arguments& a) {
  const auto in = a.array<uint32_t>("in"), out = a.array<uint32_t>("out");
  simt::launch({"transpose_matrix", 1, 32}, [=] { transpose_matrix(in, out); });
}

void run_multiply(const simt::Arguments& a) {
  const std::string& dtype = a.text("dtype");
  const auto c = a.array<float>("c");
  if (dtype == "tf32") {
    const auto x = a.array<float>("a"), y = a.array<float>("b");
    simt::launch({"multiply_tf32", 1, 32}, [=] { multiply_tf32(x, y, c); });
    return;
  }
  const auto x = a.array<uint16_t>("a"), y = a.array<uint16_t>("b");
  if (dtype == "float16")
    simt::launch({"multiply_16", 1, 32}, [=] { multiply_16<true>(x, y, c); });
  else
    simt::launch({"multiply_16", 1, 32}, [=] { multiply_16<false>(x, y, c); });
}

void run_warp_operations(const simt::Arguments& a) {
  const auto in = a.array<int32_t>("in"), out = a.array<int32_t>("out");
  simt::launch({"warp_operations", 1, 32}, [=] { warp_operations(in, out); });
}

void run_pipeline(const simt::Arguments& a) {
  const auto in = a.array<uint32_t>("in"), out = a.array<uint32_t>("out");
  const int tiles = static_cast<int>(a.integer("tiles")), count = static_cast<int>(a.integer("count"));
  simt::launch({"pipeline", 1, 64}, [=] { pipeline(in, out, tiles, count); });
}

void run_small_copies(const simt::Arguments& a) {
  const auto in = a.array<uint32_t>("in"), out = a.array<uint32_t>("out");
  simt::launch({"small_copies", 1, 32, 96 * sizeof(uint32_t)}, [=] { small_copies(in, out); });
}

void run_barrier_votes(const simt::Arguments& a) {
  const auto in = a.array<int32_t>("in"), out = a.array<int32_t>("out");
  const dim3 threads(static_cast<unsigned>(a.integer("threads")));
  simt::launch({"barrier_votes", 1, threads}, [=] { barrier_votes(in, out); });
}

void run_convert(const simt::Arguments& a) {
  const auto in = a.array<uint32_t>("in"), out = a.array<uint32_t>("out");
  const int count = static_cast<int>(a.integer("count")), what = static_cast<int>(a.integer("what"));
  simt::launch({"convert", 1, 32}, [=] { convert(in, out, count, what); });
}

const simt::Registration registrations[] = {
    {"matrices", run_matrices}, {"multiply", run_multiply},         {"warp_operations", run_warp_operations},
    {"pipeline", run_pipeline}, {"small_copies", run_small_copies}, {"barrier_votes", run_barrier_votes},
    {"convert", run_convert},   {"transpose", run_transpose},
};

}  // namespace
