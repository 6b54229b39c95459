// Means over square windows of the encoder's patches, cast on the way out, and their gradient. One block a row.
#include <type_traits>

#include "common.cuh"

namespace emu2 {
namespace {

template <typename T, typename Out, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    pool_kernel(const T* __restrict__ hidden, Out* __restrict__ out, int images, int side, int window, int width) {
  const int across = side / window, places = across * across;
  const float share = 1.0f / float(window * window);
  for (int row = blockIdx.x; row < images * places; row += gridDim.x) {
    const int image = row / places, place = row % places;
    const int corner = place / across * window * side + place % across * window;
    const T* from = hidden + int64_t(image * (1 + side * side) + 1 + corner) * width;  // 1: CLS
    for (int i = threadIdx.x * V; i < width; i += kThreads * V) {
      float sum[V] = {};
      for (int y = 0; y < window; ++y) {
#pragma unroll 4  // loads in flight
        for (int x = 0; x < window; ++x) {
          const Pack<T, V> patch = load<V>(from + int64_t(y * side + x) * width + i);
#pragma unroll
          for (int k = 0; k < V; ++k) sum[k] += to_float(patch.value[k]);
        }
      }
      Pack<Out, V> mean;
#pragma unroll
      for (int k = 0; k < V; ++k) mean.value[k] = from_float<Out>(sum[k] * share);
      store<V>(out + int64_t(row) * width + i, mean);
    }
  }
}

// A row is a patch: it reads its window's gradient, which the window's other patches find in the cache.
template <typename T, typename Out, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    pool_backward_kernel(const Out* __restrict__ gradient, T* __restrict__ hidden_gradient, int images, int side,
                         int window, int width) {
  const int across = side / window, tokens = 1 + side * side;
  const float share = 1.0f / float(window * window);
  for (int row = blockIdx.x; row < images * tokens; row += gridDim.x) {
    const int image = row / tokens, patch = row % tokens - 1;  // -1: CLS
    const int place = patch / side / window * across + patch % side / window;
    const Out* from = patch < 0 ? nullptr : gradient + int64_t(image * across * across + place) * width;
    for (int i = threadIdx.x * V; i < width; i += kThreads * V) {
      Pack<Out, V> mean = {};
      if (from != nullptr) mean = load<V>(from + i);
      Pack<T, V> pack;
#pragma unroll
      for (int k = 0; k < V; ++k) pack.value[k] = from_float<T>(to_float(mean.value[k]) * share);
      store<V>(hidden_gradient + int64_t(row) * width + i, pack);
    }
  }
}

// Calls f with values of both types, and the number of elements of an access that suits the pointers.
template <typename F>
int with_types(int dtype, int out_dtype, int64_t width, const void* hidden, const void* out, F f) {
  return with_type(dtype, [&](auto element) {
    return with_type(out_dtype, [&](auto out_element) {
      using T = decltype(element);
      using Out = decltype(out_element);
      constexpr int V = kWidest<T, Out>;
      const bool vectors = aligned(V * sizeof(T), width * int64_t(sizeof(T)), hidden) &&
                           aligned(V * sizeof(Out), width * int64_t(sizeof(Out)), out);
      return vectors ? f(element, out_element, std::integral_constant<int, V>{})
                     : f(element, out_element, std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace
}  // namespace emu2

int emu2_pool(const void* hidden, void* out, int64_t images, int64_t side, int64_t window, int64_t width, int dtype,
              int out_dtype, void* stream) {
  if (!emu2::countable(images, side, window, width, images * (1 + side * side))) return cudaErrorInvalidValue;
  if (window == 0 || side % window != 0) return cudaErrorInvalidValue;
  const int64_t rows = images * (side / window) * (side / window);
  if (rows == 0 || width == 0) return cudaSuccess;
  return emu2::with_types(dtype, out_dtype, width, hidden, out, [&](auto element, auto out_element, auto vector) {
    using T = decltype(element);
    using Out = decltype(out_element);
    return emu2::launch(emu2::pool_kernel<T, Out, vector()>, rows, stream, static_cast<const T*>(hidden),
                        static_cast<Out*>(out), int(images), int(side), int(window), int(width));
  });
}

int emu2_pool_backward(const void* gradient, void* hidden_gradient, int64_t images, int64_t side, int64_t window,
                       int64_t width, int dtype, int out_dtype, void* stream) {
  const int64_t rows = images * (1 + side * side);
  if (!emu2::countable(images, side, window, width, rows)) return cudaErrorInvalidValue;
  if (window == 0 || side % window != 0) return cudaErrorInvalidValue;
  if (rows == 0 || width == 0) return cudaSuccess;
  const void* hidden = hidden_gradient;
  return emu2::with_types(dtype, out_dtype, width, hidden, gradient, [&](auto element, auto out_element, auto vector) {
    using T = decltype(element);
    using Out = decltype(out_element);
    return emu2::launch(emu2::pool_backward_kernel<T, Out, vector()>, rows, stream, static_cast<const Out*>(gradient),
                        static_cast<T*>(hidden_gradient), int(images), int(side), int(window), int(width));
  });
}
