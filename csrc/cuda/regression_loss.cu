// Masked squared error between rows that are somewhere in `predicted` and targets, with its gradient, in one pass.
//
// A warp takes a row and leaves its sum in `partial`; the block that finishes last adds these up. Which warp and which
// block that is has no say in the order of any addition, so the result has the same bits on every device.
#include "common.cuh"

namespace emu2 {
namespace {

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  return x;  // lane 0 has it
}

// Sum over the block; thread 0 has it.
__device__ inline float block_sum(float x) {
  __shared__ float sums[kWarps];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = threadIdx.x < kWarps ? sums[threadIdx.x] : 0.0f;
  return warp_sum(x);
}

// This lane's share of a row's squared error.
template <int V, bool kGradient, typename T>
__device__ inline float row_error(const T* __restrict__ predicted, const T* __restrict__ target,
                                  T* __restrict__ gradient, float factor, int width) {
  float sum = 0.0f;
  for (int i = threadIdx.x % kWarp * V; i < width; i += kWarp * V) {
    const Pack<T, V> p = load<V>(predicted + i), t = load<V>(target + i);
    Pack<T, V> g;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float error = to_float(p.value[k]) - to_float(t.value[k]);
      sum += error * error;
      g.value[k] = from_float<T>(factor * error);
    }
    if (kGradient) store<V>(gradient + i, g);
  }
  return sum;
}

template <int V, typename T>
__device__ inline void zero_row(T* row, int width) {
  Pack<T, V> zeros;
#pragma unroll
  for (int k = 0; k < V; ++k) zeros.value[k] = from_float<T>(0.0f);
  for (int i = threadIdx.x % kWarp * V; i < width; i += kWarp * V) store<V>(row + i, zeros);
}

// True in all threads of the one block that gets here last; what all blocks wrote before is visible to it then.
__device__ inline bool is_last_block(uint32_t* counter) {
  __shared__ bool last;
  __syncthreads();  // this block has written
  if (threadIdx.x == 0) {
    // Everybody sees it before the block counts as done, and what others wrote is read only behind the count.
    __threadfence();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;  // the last one takes the counter back to 0
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <typename T, int V, bool kGradient>
__global__ void __launch_bounds__(kThreads, kResident)
    regression_loss_kernel(const T* predicted, const T* target, const int32_t* slot, const float* denominator,
                           const float* gradient_scale, T* gradient, float* partial, uint32_t* counter, float* loss,
                           int rows, int target_rows, int width) {
  const bool first_lane = threadIdx.x % kWarp == 0;
  // The loss scale comes in before rounding to T: in fp16 the gradient of a mean would be nearly all zeros.
  const float factor = *gradient_scale * 2.0f / *denominator;
  for (int row = blockIdx.x * kWarps + threadIdx.x / kWarp; row < rows; row += gridDim.x * kWarps) {
    const int source = slot[row];  // the same in all lanes
    if (source >= target_rows) __trap();
    T* row_gradient = kGradient ? gradient + int64_t(row) * width : nullptr;
    float sum = 0.0f;
    if (source >= 0) {
      sum = row_error<V, kGradient>(predicted + int64_t(row) * width, target + int64_t(source) * width, row_gradient,
                                    factor, width);
    } else if (kGradient) {
      zero_row<V>(row_gradient, width);
    }
    sum = warp_sum(sum);
    if (first_lane) partial[row] = sum;
  }
  if (!is_last_block(counter)) return;
  float sum = 0.0f;
  for (int row = threadIdx.x; row < rows; row += kThreads) sum += partial[row];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = sum / *denominator;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    rescale_kernel(const T* gradient, const float* upstream, const float* folded, T* out, int64_t elements,
                   int64_t vectors) {
  constexpr int V = kWidest<T>;
  const float factor = *upstream / *folded;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = first; i < vectors; i += stride) {
    Pack<T, V> pack = load<V>(gradient + i * V);
#pragma unroll
    for (int k = 0; k < V; ++k) pack.value[k] = from_float<T>(to_float(pack.value[k]) * factor);
    store<V>(out + i * V, pack);
  }
  for (int64_t i = vectors * V + first; i < elements; i += stride) {
    out[i] = from_float<T>(to_float(gradient[i]) * factor);
  }
}

}  // namespace
}  // namespace emu2

int emu2_regression_loss(const void* predicted, const void* target, const int32_t* slot, const float* denominator,
                         const float* gradient_scale, void* gradient, float* partial, uint32_t* counter, float* loss,
                         int64_t rows, int64_t target_rows, int64_t width, int dtype, void* stream) {
  if (!emu2::countable(rows, target_rows, width)) return cudaErrorInvalidValue;
  return emu2::with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = emu2::kWidest<T>;
    const bool vectors = emu2::aligned(16, width * int64_t(sizeof(T)), predicted, target, gradient);
    auto kernel = vectors ? emu2::regression_loss_kernel<T, V, true> : emu2::regression_loss_kernel<T, 1, true>;
    if (gradient == nullptr) {
      kernel = vectors ? emu2::regression_loss_kernel<T, V, false> : emu2::regression_loss_kernel<T, 1, false>;
    }
    const int64_t blocks = (rows + emu2::kWarps - 1) / emu2::kWarps;
    return emu2::launch(kernel, blocks, stream, static_cast<const T*>(predicted), static_cast<const T*>(target), slot,
                        denominator, gradient_scale, static_cast<T*>(gradient), partial, counter, loss, int(rows),
                        int(target_rows), int(width));
  });
}

int emu2_rescale(const void* gradient, const float* upstream, const float* folded, void* out, int64_t elements,
                 int dtype, void* stream) {
  if (elements == 0) return cudaSuccess;
  return emu2::with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t vectors = emu2::aligned(16, 0, gradient, out) ? elements / emu2::kWidest<T> : 0;
    const int64_t items = vectors > 0 ? vectors : elements;
    return emu2::launch(emu2::rescale_kernel<T>, (items + emu2::kThreads - 1) / emu2::kThreads, stream,
                        static_cast<const T*>(gradient), upstream, folded, static_cast<T*>(out), elements, vectors);
  });
}
