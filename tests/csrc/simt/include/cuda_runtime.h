// CUDA as the kernels see it, for g++: put before the toolkit's headers, it runs unmodified .cu files on the emulator.
// Only what has a meaning there is declared; anything else does not compile.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../simt.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// A block runs on an OS thread of its own, so a variable of that thread is one of the block. (In a function
// thread_local implies static; `extern __shared__` is defined in block.cpp.)
#define __shared__ thread_local

inline constexpr simt::Coordinates<&simt::Lane::thread> threadIdx{};
inline constexpr simt::Coordinates<&simt::Lane::block> blockIdx{};
inline constexpr simt::Coordinates<&simt::Lane::block_size> blockDim{};
inline constexpr simt::Coordinates<&simt::Lane::grid_size> gridDim{};

// The place of the call tells barriers apart.
#define SIMT_HERE (__FILE__ ":" SIMT_TEXT(__LINE__))
#define SIMT_TEXT(line) SIMT_TEXT_(line)
#define SIMT_TEXT_(line) #line
#define __syncthreads() simt::block_barrier(SIMT_HERE)
#define __syncwarp(...) simt::warp_barrier(simt::first_of(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu), SIMT_HERE)
#define __ballot_sync(mask, predicate) simt::ballot(mask, predicate, SIMT_HERE)
#define __shfl_sync(...) simt::shuffle(SIMT_HERE, simt::Shuffle::kIndex, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle(SIMT_HERE, simt::Shuffle::kUp, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle(SIMT_HERE, simt::Shuffle::kDown, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle(SIMT_HERE, simt::Shuffle::kXor, __VA_ARGS__)
#define __trap() simt::fail("trap", SIMT_HERE)

inline void __threadfence() { simt::fence(); }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

// Atomics are relaxed, as CUDA's: they order nothing but themselves, unless a fence stands beside them.
template <typename T, typename F>
T simt_atomic(T* address, F change) {
  simt::before_atomic(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, T(change(old)), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  simt::after_atomic(address);
  return old;
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return simt_atomic(address, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return simt_atomic(address, [=](unsigned old) { return old + value; });
}
inline float atomicAdd(float* address, float value) {
  unsigned bits = simt_atomic(reinterpret_cast<unsigned*>(address),
                              [=](unsigned old) { return std::bit_cast<unsigned>(std::bit_cast<float>(old) + value); });
  return std::bit_cast<float>(bits);
}

// The host's side.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct SimtStream*;
using dim3 = simt::Size;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::settings().multiprocessors;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
// Runs to the end. A kernel that traps, or is found out, gives the error that a device gives at the next
// synchronisation.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const bool fine = simt::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                 reinterpret_cast<const void*>(kernel), [=] { kernel(arguments...); });
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
}
