// What the kernels share: elements and how they are moved, and how a kernel is launched.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace emu2 {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / kWarp;
// Blocks of a multiprocessor at least, so 64 registers a thread at most. Asked for more, nvcc spills to get there, and
// 1024 threads with 64 bytes on their way each are more than memory needs to stay busy.
constexpr int kResident = 4;

// Arithmetic is fp32 everywhere; these are the only conversions. To 16 bits they round to nearest, ties to even.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// V neighbours, moved by one access of the word that has their size.
template <typename T, int V>
struct Pack {
  T value[V];
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<2> {
  using Type = uint16_t;
};

template <int V, typename T>
__device__ inline Pack<T, V> load(const T* from) {
  using Word = typename WordOf<V * sizeof(T)>::Type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Pack<T, V> pack;
  memcpy(&pack, &word, sizeof(Word));
  return pack;
}

template <int V, typename T>
__device__ inline void store(T* to, const Pack<T, V>& pack) {
  using Word = typename WordOf<V * sizeof(T)>::Type;
  Word word;
  memcpy(&word, &pack, sizeof(Word));
  __stwb(reinterpret_cast<Word*>(to), word);  // an ordinary store, which nvcc does not break up in unrolled loops
}

// The widest access: 16 bytes. Of two types, that of the wider one.
template <typename... T>
constexpr int kWidest = std::min({16 / int(sizeof(T))...});

// Whether every pointer, and every row of this many bytes behind it, starts at a multiple of `bytes`. Null does.
template <typename... Pointers>
bool aligned(int64_t bytes, int64_t row_bytes, const Pointers*... pointers) {
  return row_bytes % bytes == 0 && ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

// Kernels count rows and elements of a row in 32 bits, with room for a stride; only offsets have 64.
template <typename... Sizes>
bool countable(Sizes... sizes) {
  return ((sizes >= 0 && sizes <= int64_t(1) << 30) && ...);
}

// Calls f with a value of the dtype's type.
template <typename F>
int with_type(int dtype, F f) {
  switch (dtype) {
    case EMU2_F32:
      return f(float{});
    case EMU2_F16:
      return f(__half{});
    case EMU2_BF16:
      return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// Starts as many of the `wanted` blocks as the device holds at once (at least one): kernels stride over the rest. Only
// enqueues, so a CUDA graph can capture it.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t wanted, void* stream, Arguments... arguments) {
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::clamp<int64_t>(wanted, 1, int64_t(multiprocessors) * resident)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace emu2
