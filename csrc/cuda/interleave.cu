// Visual rows into the token embeddings, and gradients back out. Only bytes move: no dtype, no arithmetic, one block a
// row.
#include "common.cuh"

namespace emu2 {
namespace {

constexpr int kInFlight = 4;  // loads of a thread before its first store

// The row `from`, or zeros where it is null.
template <typename Chunk>
__device__ inline void write_row(Chunk* to, const Chunk* from, int chunks) {
  for (int start = threadIdx.x; start < chunks; start += kInFlight * kThreads) {
    Chunk held[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int i = start + k * kThreads;
      if (from != nullptr && i < chunks) held[k] = from[i];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int i = start + k * kThreads;
      if (i < chunks) to[i] = held[k];
    }
  }
}

template <typename Chunk>
__global__ void __launch_bounds__(kThreads, kResident)
    interleave_kernel(const Chunk* text, const Chunk* visual, const int32_t* slot, Chunk* out, int rows,
                      int visual_rows, int chunks) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int source = slot[row];
    if (source >= visual_rows) __trap();
    const int64_t start = int64_t(row) * chunks;
    const Chunk* from = nullptr;
    if (source >= 0) from = visual + int64_t(source) * chunks;
    if (source == EMU2_TEXT) from = text + start;
    write_row(out + start, from, chunks);
  }
}

template <typename Chunk>
__global__ void __launch_bounds__(kThreads, kResident)
    interleave_backward_kernel(const Chunk* gradient, const int32_t* slot, Chunk* text_gradient, Chunk* visual_gradient,
                               int rows, int visual_rows, int chunks) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const int source = slot[row];
    if (source >= visual_rows) __trap();
    const int64_t start = int64_t(row) * chunks;
    const Chunk* from = gradient + start;
    if (text_gradient != nullptr) write_row(text_gradient + start, source == EMU2_TEXT ? from : nullptr, chunks);
    if (visual_gradient != nullptr && source >= 0) {
      // A visual row is in one slot at most, so nobody else writes there.
      write_row(visual_gradient + int64_t(source) * chunks, from, chunks);
    }
  }
}

// Calls f with a value of the widest chunk that divides the rows and suits the pointers.
template <typename F, typename... Pointers>
int with_chunk(F f, int64_t row_bytes, const Pointers*... pointers) {
  if (aligned(16, row_bytes, pointers...)) return f(uint4{});
  if (aligned(4, row_bytes, pointers...)) return f(uint32_t{});
  if (aligned(2, row_bytes, pointers...)) return f(uint16_t{});
  return f(uint8_t{});
}

}  // namespace
}  // namespace emu2

int emu2_interleave(const void* text, const void* visual, const int32_t* slot, void* out, int64_t rows,
                    int64_t visual_rows, int64_t row_bytes, void* stream) {
  if (!emu2::countable(rows, visual_rows, row_bytes)) return cudaErrorInvalidValue;
  if (rows == 0 || row_bytes == 0) return cudaSuccess;
  const auto start = [&](auto chunk) {
    using Chunk = decltype(chunk);
    return emu2::launch(emu2::interleave_kernel<Chunk>, rows, stream, static_cast<const Chunk*>(text),
                        static_cast<const Chunk*>(visual), slot, static_cast<Chunk*>(out), int(rows), int(visual_rows),
                        int(row_bytes / sizeof(Chunk)));
  };
  return emu2::with_chunk(start, row_bytes, text, visual, out);
}

int emu2_interleave_backward(const void* gradient, const int32_t* slot, void* text_gradient, void* visual_gradient,
                             int64_t rows, int64_t visual_rows, int64_t row_bytes, void* stream) {
  if (!emu2::countable(rows, visual_rows, row_bytes)) return cudaErrorInvalidValue;
  if (rows == 0 || row_bytes == 0) return cudaSuccess;
  const auto start = [&](auto chunk) {
    using Chunk = decltype(chunk);
    return emu2::launch(emu2::interleave_backward_kernel<Chunk>, rows, stream, static_cast<const Chunk*>(gradient),
                        slot, static_cast<Chunk*>(text_gradient), static_cast<Chunk*>(visual_gradient), int(rows),
                        int(visual_rows), int(row_bytes / sizeof(Chunk)));
  };
  return emu2::with_chunk(start, row_bytes, gradient, text_gradient, visual_gradient);
}
