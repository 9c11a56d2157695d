// What the byte model of docs/kernels.md assumes, measured: one program, no torch, on stdout one JSON object
// a line for each figure as soon as it is known. A part that fails says so on stderr, and the others go on.
//
//   nvcc -O3 -std=c++17 -arch=native -I csrc benchmarks/gpu/ceilings.cu -o build/ceilings && build/ceilings
//
//   copy           device to device, read plus written                                     bytes/s
//   gather         random rows of 256, 512 and 4096 bytes out of sets that fit the L2 cache and one that does
//                  not, by plain loads and by cp.async                                     bytes/s
//   partials       rows written in order, then read back in random order, as attention's partial results are,
//                  for sets of several sizes                                               bytes/s, both ways
//   mma            mma.sync m16n8k16 bf16 out of registers, 4 to 16 warps per multiprocessor   FLOP/s
//   launch         empty kernels: one after another on a stream, in a graph, and in a graph with
//                  programmatic dependent launch                                           seconds each
//
// Every figure is the median of kRepeats timings by events, after a warm-up.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/griddepcontrol.cuh"
#include "cuda/ptx/mma.cuh"

namespace {

namespace ptx = resona::cuda::ptx;

constexpr int kRepeats = 15, kThreads = 256, kAhead = 8;
constexpr int kLaunches = 200, kChain = 20;

void require(cudaError_t error, const char* step) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(step) + ": expected success, got " + cudaGetErrorString(error));
}

// ---- kernels

// A different row for every item, with no pattern: the high half of a product with a hash.
__device__ __forceinline__ uint32_t random_row(uint32_t item, uint32_t rows) {
  item ^= item >> 16;
  item *= 0x7feb352du;
  item ^= item >> 15;
  item *= 0x846ca68bu;
  item ^= item >> 16;
  return __umulhi(item, rows);
}

// kVectors 16-byte pieces per row, a lane for each of up to 32; kAhead rows in flight per lane.
template <int kVectors, bool kAsync>
__global__ void gather_kernel(const uint4* set, uint32_t rows, uint32_t items, uint4* sink) {
  __shared__ uint4 landed[kAsync ? kAhead * kThreads : 1];
  constexpr int kLanes = kVectors < 32 ? kVectors : 32;
  const uint32_t team = (blockIdx.x * kThreads + threadIdx.x) / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t teams = gridDim.x * (kThreads / kLanes);
  uint4 sum{};
  for (uint32_t first = team * kAhead; first < items; first += teams * kAhead) {
    for (int v = lane; v < kVectors; v += kLanes) {
      uint4 got[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint4* from = set + static_cast<size_t>(random_row(first + i, rows)) * kVectors + v;
        if constexpr (kAsync)
          ptx::cp_async_cg_16(landed + i * kThreads + threadIdx.x, from);
        else
          got[i] = *from;
      }
      if constexpr (kAsync) {
        ptx::cp_async_commit_group();
        ptx::cp_async_wait_all();
      } else {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) sum.x ^= got[i].x ^ got[i].y ^ got[i].z ^ got[i].w;
      }
    }
  }
  if constexpr (kAsync) sum = landed[threadIdx.x];
  if (sum.x == 0x12345678u) sink[threadIdx.x] = sum;  // never, but the loads have to stay
}

__global__ void write_kernel(uint4* set, size_t count) {
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t i = blockIdx.x * static_cast<size_t>(kThreads) + threadIdx.x; i < count; i += step)
    set[i] = uint4{static_cast<uint32_t>(i), 1, 2, 3};
}

__global__ void mma_kernel(int rounds, float* sink) {
  uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {threadIdx.x * 3, 5};
  float acc[8][4] = {};
  for (int i = 0; i < rounds; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) ptx::mma_m16n8k16_bf16(acc[j], a, b);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum += acc[j][0] + acc[j][1] + acc[j][2] + acc[j][3];
  if (sum == 1234.5f) *sink = sum;
}

__global__ void empty_kernel() {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
}

// ---- timing

struct Device {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  int sms;

  // Median seconds of what `work` puts on the stream.
  double time(const std::function<void()>& work) const {
    work();
    std::vector<double> seconds;
    for (int i = 0; i < kRepeats; ++i) {
      require(cudaEventRecord(begin, stream), "cudaEventRecord");
      work();
      require(cudaEventRecord(end, stream), "cudaEventRecord");
      require(cudaEventSynchronize(end), "cudaEventSynchronize");
      float milliseconds = 0;
      require(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
      seconds.push_back(milliseconds * 1e-3);
    }
    require(cudaGetLastError(), "kernel launch");
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }
};

void report(const std::string& name, double value) {
  std::printf("{\"%s\": %.6g}\n", name.c_str(), value);
  std::fflush(stdout);
}

// How many of the parts failed so far.
int failures = 0;

void attempt(const char* part, const std::function<void()>& measure) {
  try {
    measure();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ceilings: %s: %s\n", part, error.what());
    ++failures;
  }
}

// ---- measurements

template <int kVectors, bool kAsync>
void gather(const Device& d, const uint4* set, size_t megabytes, uint4* sink) {
  const size_t row = kVectors * 16, total = size_t{2} << 30;
  const uint32_t rows = static_cast<uint32_t>((megabytes << 20) / row);
  const uint32_t items = static_cast<uint32_t>(total / row);
  const double seconds = d.time(
      [&] { gather_kernel<kVectors, kAsync><<<d.sms * 8, kThreads, 0, d.stream>>>(set, rows, items, sink); });
  const char* how = kAsync ? "cp_async" : "loads";
  report("gather/" + std::string(how) + "/row" + std::to_string(row) + "/set" + std::to_string(megabytes) +
             "MiB",
         static_cast<double>(items) * row / seconds);
}

void partials(const Device& d, uint4* set, size_t megabytes, uint4* sink) {
  const size_t count = (megabytes << 20) / 16, rounds = (size_t{1} << 30) / (megabytes << 20);
  const uint32_t rows = static_cast<uint32_t>(count / 16);
  const double seconds = d.time([&] {
    for (size_t i = 0; i < rounds; ++i) {
      write_kernel<<<d.sms * 8, kThreads, 0, d.stream>>>(set, count);
      gather_kernel<16, false><<<d.sms * 8, kThreads, 0, d.stream>>>(set, rows, rows, sink);
    }
  });
  report("partials/set" + std::to_string(megabytes) + "MiB",
         2.0 * static_cast<double>(rounds) * static_cast<double>(megabytes << 20) / seconds);
}

void mma(const Device& d, uint4* sink) {
  constexpr int kRounds = 4096;
  for (const int warps : {4, 8, 16}) {
    const double seconds = d.time(
        [&] { mma_kernel<<<d.sms, warps * 32, 0, d.stream>>>(kRounds, reinterpret_cast<float*>(sink)); });
    const double flops = 2.0 * 16 * 8 * 16 * 8 * kRounds * warps * d.sms;
    report("mma/m16n8k16_bf16/warps" + std::to_string(warps), flops / seconds);
  }
}

void launch_empty(cudaStream_t stream, bool dependent) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1), config.blockDim = dim3(32), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = dependent ? 1 : 0;
  require(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(empty_kernel), nullptr), "launch");
}

void launches(const Device& d) {
  const double plain = d.time([&] {
    for (int i = 0; i < kLaunches; ++i) launch_empty(d.stream, false);
  });
  report("launch/stream", plain / kLaunches);
  for (const bool dependent : {false, true}) {
    cudaGraph_t graph{};
    cudaGraphExec_t run{};
    require(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (int i = 0; i < kChain; ++i) launch_empty(d.stream, dependent);
    require(cudaStreamEndCapture(d.stream, &graph), "cudaStreamEndCapture");
    require(cudaGraphInstantiate(&run, graph, 0), "cudaGraphInstantiate");
    const double chain = d.time([&] { require(cudaGraphLaunch(run, d.stream), "cudaGraphLaunch"); });
    report(dependent ? "launch/graph_chain_dependent" : "launch/graph_chain", chain / kChain);
    require(cudaGraphExecDestroy(run), "cudaGraphExecDestroy");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
}

}  // namespace

int main() {
  Device d{};
  constexpr size_t kLargeMb = 4096;
  uint4 *set = nullptr, *other = nullptr, *sink = nullptr;
  attempt("device", [&] {
    int device = 0;
    require(cudaGetDevice(&device), "cudaGetDevice");
    require(cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    require(cudaStreamCreate(&d.stream), "cudaStreamCreate");
    require(cudaEventCreate(&d.begin), "cudaEventCreate");
    require(cudaEventCreate(&d.end), "cudaEventCreate");
    require(cudaMalloc(reinterpret_cast<void**>(&set), kLargeMb << 20), "cudaMalloc");
    require(cudaMalloc(reinterpret_cast<void**>(&other), kLargeMb << 20), "cudaMalloc");
    require(cudaMalloc(reinterpret_cast<void**>(&sink), 1 << 20), "cudaMalloc");
    write_kernel<<<d.sms * 8, kThreads, 0, d.stream>>>(set, (kLargeMb << 20) / 16);
    require(cudaStreamSynchronize(d.stream), "write_kernel");
    report("multiprocessors", d.sms);
  });
  if (failures > 0) return 1;
  attempt("copy", [&] {
    const double copy = d.time([&] {
      require(cudaMemcpyAsync(other, set, kLargeMb << 20, cudaMemcpyDeviceToDevice, d.stream),
              "cudaMemcpyAsync");
    });
    report("copy", 2.0 * static_cast<double>(kLargeMb << 20) / copy);
  });
  attempt("gather", [&] {
    for (const size_t megabytes : {size_t{8}, size_t{16}, size_t{24}, size_t{32}, size_t{48}, kLargeMb}) {
      gather<16, false>(d, set, megabytes, sink);
      gather<16, true>(d, set, megabytes, sink);
    }
    for (const size_t megabytes : {size_t{16}, kLargeMb}) {
      gather<32, true>(d, set, megabytes, sink);
      gather<256, true>(d, set, megabytes, sink);
    }
  });
  attempt("partials", [&] {
    for (const size_t megabytes : {8, 16, 24, 32, 48, 128}) partials(d, other, megabytes, sink);
  });
  attempt("mma", [&] { mma(d, sink); });
  attempt("launch", [&] { launches(d); });
  return failures > 0 ? 1 : 0;
}
