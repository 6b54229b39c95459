// The CPU kernels: what csrc/cuda/kernels.h describes, each for a part [begin, end) of the rows, so that the binding can
// share the rows out over threads. A row's result depends on that row alone, whoever computes it. Slots are valid.
#pragma once
#include "../cuda/kernels.h"

enum { EMU2_F64 = 3 };  // a dtype beside those of Emu2Dtype: gradients are checked in it. It accumulates in double.

extern "C" {

void emu2_cpu_interleave(const void* text, const void* visual, const int32_t* slot, void* out, int64_t begin,
                         int64_t end, int64_t row_bytes);

void emu2_cpu_interleave_backward(const void* gradient, const int32_t* slot, void* text_gradient,
                                  void* visual_gradient, int64_t begin, int64_t end, int64_t row_bytes);

// squares[n] = |predicted[n] - target[slot[n]]|^2, gradient[n] = factor * (predicted[n] - target[slot[n]]); both 0 where
// slot[n] < 0. gradient may be null.
void emu2_cpu_regression_loss(const void* predicted, const void* target, const int32_t* slot, double factor,
                              void* gradient, double* squares, int64_t begin, int64_t end, int64_t width, int dtype);

// Elements [begin, end).
void emu2_cpu_rescale(const void* gradient, double factor, void* out, int64_t begin, int64_t end, int dtype);

// Rows of `out` or of `gradient`: windows, counted through all images. Both dtypes are EMU2_F64, or none is.
void emu2_cpu_pool(const void* hidden, void* out, int64_t begin, int64_t end, int64_t side, int64_t window,
                   int64_t width, int dtype, int out_dtype);
void emu2_cpu_pool_backward(const void* gradient, void* hidden_gradient, int64_t begin, int64_t end, int64_t side,
                            int64_t window, int64_t width, int dtype, int out_dtype);

}  // extern "C"
