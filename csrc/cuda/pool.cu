// Means over square windows of the encoder's patches, cast on the way out, and their gradient. One block a row.
#include "common.cuh"

namespace emu2 {
namespace {

template <typename T, typename Out, int V>
__global__ void __launch_bounds__(kThreads)
pool_kernel(const T* __restrict__ hidden, Out* __restrict__ out, int64_t images, int64_t side, int64_t window,
            int64_t width) {
    const int64_t across = side / window, places = across * across;
    const float share = 1.0f / float(window * window);
    for (int64_t row = blockIdx.x; row < images * places; row += gridDim.x) {
        const int64_t image = row / places, place = row % places;
        const int64_t corner = place / across * window * side + place % across * window;
        const T* from = hidden + (image * (1 + side * side) + 1 + corner) * width;  // 1: CLS
        for (int64_t i = threadIdx.x * V; i < width; i += kThreads * V) {
            float sum[V] = {};
            for (int64_t y = 0; y < window; ++y) {
#pragma unroll 4  // loads in flight
                for (int64_t x = 0; x < window; ++x) {
                    const Pack<T, V> patch = load<V>(from + (y * side + x) * width + i);
#pragma unroll
                    for (int k = 0; k < V; ++k) sum[k] += to_float(patch.value[k]);
                }
            }
            Pack<Out, V> mean;
#pragma unroll
            for (int k = 0; k < V; ++k) mean.value[k] = from_float<Out>(sum[k] * share);
            store<V>(out + row * width + i, mean);
        }
    }
}

// A row is a patch: it reads its window's gradient, which the window's other patches find in the cache.
template <typename T, typename Out, int V>
__global__ void __launch_bounds__(kThreads)
pool_backward_kernel(const Out* __restrict__ gradient, T* __restrict__ hidden_gradient, int64_t images, int64_t side,
                     int64_t window, int64_t width) {
    const int64_t across = side / window, tokens = 1 + side * side;
    const float share = 1.0f / float(window * window);
    for (int64_t row = blockIdx.x; row < images * tokens; row += gridDim.x) {
        const int64_t image = row / tokens, patch = row % tokens - 1;  // -1: CLS
        const int64_t place = patch / side / window * across + patch % side / window;
        const Out* from = gradient + (image * across * across + place) * width;
        for (int64_t i = threadIdx.x * V; i < width; i += kThreads * V) {
            Pack<Out, V> mean = {};
            if (patch >= 0) mean = load<V>(from + i);
            Pack<T, V> pack;
#pragma unroll
            for (int k = 0; k < V; ++k) pack.value[k] = from_float<T>(to_float(mean.value[k]) * share);
            store<V>(hidden_gradient + row * width + i, pack);
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
    const int64_t rows = images * (side / window) * (side / window);
    if (rows == 0 || width == 0) return cudaSuccess;
    return emu2::with_types(dtype, out_dtype, width, hidden, out, [&](auto element, auto out_element, auto vector) {
        using T = decltype(element);
        using Out = decltype(out_element);
        return emu2::launch(emu2::pool_kernel<T, Out, vector()>, rows, stream, static_cast<const T*>(hidden),
                            static_cast<Out*>(out), images, side, window, width);
    });
}

int emu2_pool_backward(const void* gradient, void* hidden_gradient, int64_t images, int64_t side, int64_t window,
                       int64_t width, int dtype, int out_dtype, void* stream) {
    const int64_t rows = images * (1 + side * side);
    if (rows == 0 || width == 0) return cudaSuccess;
    const void* hidden = hidden_gradient;
    return emu2::with_types(dtype, out_dtype, width, hidden, gradient, [&](auto element, auto out_element, auto vector) {
        using T = decltype(element);
        using Out = decltype(out_element);
        return emu2::launch(emu2::pool_backward_kernel<T, Out, vector()>, rows, stream,
                            static_cast<const Out*>(gradient), static_cast<T*>(hidden_gradient), images, side, window,
                            width);
    });
}
