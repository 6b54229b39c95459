// Visual rows into the token embeddings, and gradients back out. Only bytes move: no dtype, no arithmetic, one block a row.
#include "common.cuh"

namespace emu2 {
namespace {

constexpr int kInFlight = 4;  // loads of a thread before its first store

// The row `from`, or zeros where it is null.
template <typename Chunk>
__device__ inline void write_row(Chunk* to, const Chunk* from, int64_t chunks) {
    for (int64_t start = threadIdx.x; start < chunks; start += kInFlight * kThreads) {
        Chunk held[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int64_t i = start + k * kThreads;
            if (from != nullptr && i < chunks) held[k] = from[i];
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int64_t i = start + k * kThreads;
            if (i < chunks) to[i] = held[k];
        }
    }
}

template <typename Chunk>
__global__ void __launch_bounds__(kThreads)
interleave_kernel(const Chunk* text, const Chunk* visual, const int32_t* slot, Chunk* out, int64_t rows,
                  int64_t visual_rows, int64_t chunks) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t source = slot[row];
        if (source >= visual_rows) __trap();
        const Chunk* from = nullptr;
        if (source >= 0) from = visual + source * chunks;
        if (source == EMU2_TEXT) from = text + row * chunks;
        write_row(out + row * chunks, from, chunks);
    }
}

template <typename Chunk>
__global__ void __launch_bounds__(kThreads)
interleave_backward_kernel(const Chunk* gradient, const int32_t* slot, Chunk* text_gradient, Chunk* visual_gradient,
                           int64_t rows, int64_t visual_rows, int64_t chunks) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t source = slot[row];
        if (source >= visual_rows) __trap();
        const Chunk* from = gradient + row * chunks;
        if (text_gradient != nullptr) {
            write_row(text_gradient + row * chunks, source == EMU2_TEXT ? from : nullptr, chunks);
        }
        // A visual row is in one slot at most, so nobody else writes there.
        if (visual_gradient != nullptr && source >= 0) write_row(visual_gradient + source * chunks, from, chunks);
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
    if (rows == 0 || row_bytes == 0) return cudaSuccess;
    const auto start = [&](auto chunk) {
        using Chunk = decltype(chunk);
        return emu2::launch(emu2::interleave_kernel<Chunk>, rows, stream, static_cast<const Chunk*>(text),
                            static_cast<const Chunk*>(visual), slot, static_cast<Chunk*>(out), rows, visual_rows,
                            row_bytes / int64_t(sizeof(Chunk)));
    };
    return emu2::with_chunk(start, row_bytes, text, visual, out);
}

int emu2_interleave_backward(const void* gradient, const int32_t* slot, void* text_gradient, void* visual_gradient,
                             int64_t rows, int64_t visual_rows, int64_t row_bytes, void* stream) {
    if (rows == 0 || row_bytes == 0) return cudaSuccess;
    const auto start = [&](auto chunk) {
        using Chunk = decltype(chunk);
        return emu2::launch(emu2::interleave_backward_kernel<Chunk>, rows, stream, static_cast<const Chunk*>(gradient),
                            slot, static_cast<Chunk*>(text_gradient), static_cast<Chunk*>(visual_gradient), rows,
                            visual_rows, row_bytes / int64_t(sizeof(Chunk)));
    };
    return emu2::with_chunk(start, row_bytes, gradient, text_gradient, visual_gradient);
}
