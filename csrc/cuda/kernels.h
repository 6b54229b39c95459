// The CUDA kernels, as raw pointers on a stream: nothing of torch on their side (its headers cost nvcc minutes), nothing
// of CUDA on the binding's. Every function only enqueues work, and returns 0 or a cudaError_t.
//
// Matrices are row-major and contiguous. A width is a number of elements, `dtype` one of Emu2Dtype. `stream` is a
// cudaStream_t. Any alignment that suits the dtype will do; 16 bytes are faster. Zero rows are fine. More than 2^30 rows,
// elements or bytes of a row are refused (cudaErrorInvalidValue); there may be more elements in all.
#pragma once
#include <cstdint>

enum Emu2Dtype { EMU2_F32 = 0, EMU2_F16 = 1, EMU2_BF16 = 2 };

// Values of a slot below 0: the row of the text as it is, or zeros (another tensor-parallel rank writes the row).
enum { EMU2_TEXT = -1, EMU2_NOTHING = -2 };

extern "C" {

// out[i] = visual[slot[i]] where slot[i] >= 0, text[i] where it is EMU2_TEXT, else 0.
//   text, out: [rows, row_bytes]; visual: [visual_rows, row_bytes]; slot: int32 [rows], each visual row in it at most once.
// A slot that is not below visual_rows traps.
int emu2_interleave(const void* text, const void* visual, const int32_t* slot, void* out, int64_t rows,
                    int64_t visual_rows, int64_t row_bytes, void* stream);

// text_gradient[i] = gradient[i] where slot[i] is EMU2_TEXT, else 0; visual_gradient[slot[i]] = gradient[i].
//   Rows of visual_gradient that no slot names are left as they are. Either of the two may be null: not wanted.
int emu2_interleave_backward(const void* gradient, const int32_t* slot, void* text_gradient, void* visual_gradient,
                             int64_t rows, int64_t visual_rows, int64_t row_bytes, void* stream);

// loss = sum over rows n with slot[n] >= 0 of |predicted[n] - target[slot[n]]|^2 / denominator
// gradient[n] = gradient_scale * 2 * (predicted[n] - target[slot[n]]) / denominator, 0 where slot[n] < 0
//   predicted, gradient: [rows, width] of dtype; target: [target_rows, width] of dtype; slot: int32 [rows];
//   denominator, gradient_scale, loss: one float each, on the device; gradient may be null: not wanted.
//   partial: scratch, `rows` floats; counter: scratch, one uint32 that is 0 before and after.
// Rows with a negative slot are not read (they may hold NaN). fp32 accumulation in a fixed order: the result has the
// same bits in every run. A slot that is not below target_rows traps.
int emu2_regression_loss(const void* predicted, const void* target, const int32_t* slot, const float* denominator,
                         const float* gradient_scale, void* gradient, float* partial, uint32_t* counter, float* loss,
                         int64_t rows, int64_t target_rows, int64_t width, int dtype, void* stream);

// out[i] = gradient[i] * (upstream / folded), computed in fp32; upstream and folded: one float each, on the device.
//   out may be gradient.
int emu2_rescale(const void* gradient, const float* upstream, const float* folded, void* out, int64_t elements,
                 int dtype, void* stream);

// Means over square windows of the patches, CLS (patch 0) dropped.
//   hidden: [images, 1 + side * side, width] of dtype; out: [images, (side / window)^2, width] of out_dtype, raster order.
//   window divides side. fp32 accumulation in a fixed order, one rounding.
int emu2_pool(const void* hidden, void* out, int64_t images, int64_t side, int64_t window, int64_t width, int dtype,
              int out_dtype, void* stream);

// hidden_gradient: [images, 1 + side * side, width] of dtype, each patch 1 / window^2 of its window's gradient (of
// out_dtype), CLS 0. All of it is written.
int emu2_pool_backward(const void* gradient, void* hidden_gradient, int64_t images, int64_t side, int64_t window,
                       int64_t width, int dtype, int out_dtype, void* stream);

}  // extern "C"
