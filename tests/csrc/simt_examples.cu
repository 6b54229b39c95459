// Small kernels, right ones and wrong ones, that show what the emulator does and what it sees.
//
//   simt_examples NAME
//
// prints what the kernel wrote, or the emulator's report.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern __shared__ float dynamic_shared[];

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Of 40 threads, so that the second warp has 8.
__global__ void shuffles(float* out) {
  const int thread = threadIdx.x;
  const unsigned mask = thread < 32 ? kAll : 0xffu;
  float* mine = out + 6 * thread;
  mine[0] = __shfl_sync(mask, float(thread), 3);
  mine[1] = __shfl_sync(mask, float(thread), 1, 4);
  mine[2] = __shfl_up_sync(mask, float(thread), 2, 8);
  mine[3] = __shfl_down_sync(mask, float(thread), 1, 8);
  mine[4] = __shfl_xor_sync(mask, float(thread), 1);
  mine[5] = float(__ballot_sync(mask, thread % 3 == 0));
}

__global__ void reverse(float* out) {
  const int thread = threadIdx.x + threadIdx.y * blockDim.x, threads = blockDim.x * blockDim.y;
  dynamic_shared[thread] = float(thread);
  __syncthreads();
  out[blockIdx.x * threads + thread] = dynamic_shared[threads - 1 - thread];
}

__global__ void beyond_dynamic(float* out) { out[threadIdx.x] = dynamic_shared[threadIdx.x + 1]; }

__global__ void unwritten(float* out) {
  __shared__ float values[8];
  if (threadIdx.x == 0) values[0] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// A shuffle brings a value over, it does not order memory.
template <bool kBarrier>
__global__ void neighbours(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = float(threadIdx.x);
  if (kBarrier) {
    __syncwarp();
  } else {
    __shfl_xor_sync(kAll, 0.0f, 1);
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void sum(float* out) { atomicAdd(out, 1.0f); }
__global__ void plain_sum(float* out) { *out = *out + 1.0f; }

__global__ void early_exit(float* out) {  // fine: who has left is not waited for
  if (threadIdx.x % 2) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void one_waits(float*) {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void outside_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xffffu, 1.0f, 1);
}

struct Example {
  const char* name;
  void (*kernel)(float*);
  dim3 grid, block;
  int outputs;
  size_t dynamic_bytes = 0;
};

const Example kExamples[] = {
    {"shuffles", shuffles, 1, 40, 240},
    {"reverse", reverse, 2, dim3(3, 4), 24, 48},
    {"beyond_dynamic", beyond_dynamic, 1, 8, 8, 32},
    {"unwritten", unwritten, 1, 8, 8},
    {"ordered_neighbours", neighbours<true>, 1, 32, 32},
    {"shuffled_neighbours", neighbours<false>, 1, 32, 32},
    {"sum", sum, 3, 50, 1},
    {"plain_sum", plain_sum, 3, 1, 1},
    {"early_exit", early_exit, 1, 40, 40},
    {"two_barriers", two_barriers, 1, 64, 0},
    {"one_waits", one_waits, 1, 32, 0},
    {"outside_mask", outside_mask, 1, 32, 32},
    {"too_large", sum, 1, 1025, 1},
};

}  // namespace

int main(int, char** arguments) {
  simt_configure(1, std::strtoull(arguments[2], nullptr, 10));
  for (const Example& example : kExamples) {
    if (std::string(arguments[1]) != example.name) continue;
    std::vector<float> out(size_t(example.outputs));
    const cudaLaunchConfig_t config{example.grid, example.block, example.dynamic_bytes};
    if (cudaLaunchKernelEx(&config, example.kernel, out.data()) != cudaSuccess) {
      std::printf("%s\n", simt_report());
      return 1;
    }
    for (float value : out) std::printf("%.9g ", double(value));
    return 0;
  }
  return 2;
}
