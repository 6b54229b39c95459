// The ops of the namespace `emu2` on LibTorch's stable ABI: one source, one function an op, for CPU and CUDA tensors.
//
// Shapes and dtypes are checked here, and inputs made contiguous; so are, on the CPU, the slots (on CUDA that would wait
// for the device: there a wrong one traps). Shapes for tracing and gradients are registered in Python, beside the
// function that calls the op (emu2_megatron/ops).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#ifdef EMU2_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::Tensor;

int dtype_of(const char* op, ScalarType type, const Tensor& like) {
  switch (type) {
    case ScalarType::Float:
      return EMU2_F32;
    case ScalarType::Half:
      return EMU2_F16;
    case ScalarType::BFloat16:
      return EMU2_BF16;
    case ScalarType::Double:
      if (like.is_cpu()) return EMU2_F64;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32, float16 or bfloat16 (or, on the CPU, float64)");
  }
}
int dtype_of(const char* op, const Tensor& tensor) { return dtype_of(op, tensor.scalar_type(), tensor); }

int64_t width_of(const char* op, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": rows of a width are needed, not a scalar");
  return tensor.size(tensor.dim() - 1);
}

// Product of all dimensions but the last.
int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) rows *= tensor.size(dim);
  return rows;
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) shape.push_back(tensor.size(dim));
  return shape;
}

void check_device(const char* op, const Tensor& first, const Tensor& other) {
  STD_TORCH_CHECK(first.is_cpu() == other.is_cpu() && first.get_device_index() == other.get_device_index(), op,
                  ": all tensors must be on the same device");
}

// `slot` as int32 on the device of `rows`, one for each of its rows.
Tensor checked_slot(const char* op, const Tensor& slot, const Tensor& rows) {
  check_device(op, rows, slot);
  STD_TORCH_CHECK(slot.scalar_type() == ScalarType::Int, op, ": slots must be int32");
  STD_TORCH_CHECK(slot.numel() == rows_of(rows), op, ": ", slot.numel(), " slots for ", rows_of(rows), " rows");
  return contiguous(slot);
}

// CPU: for each of `rows` rows the slot that names it, or -1.
std::vector<int64_t> namers(const char* op, const Tensor& slot, int64_t rows) {
  std::vector<int64_t> by(rows, -1);
  const auto* values = static_cast<const int32_t*>(slot.data_ptr());
  for (int64_t i = 0; i < slot.numel(); ++i) {
    const int64_t row = values[i];
    STD_TORCH_CHECK(EMU2_NOTHING <= row && row < rows, op, ": slot ", i, " is ", row, ", legal: -2, -1, and rows below ",
                    rows);
    if (row < 0) continue;
    STD_TORCH_CHECK(by[row] < 0, op, ": slots ", by[row], " and ", i, " both name row ", row);
    by[row] = i;
  }
  return by;
}

// A one-element tensor of the dtype that `like` accumulates in.
Tensor checked_scalar(const char* op, const char* name, const Tensor& scalar, const Tensor& like) {
  check_device(op, like, scalar);
  const auto wanted = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(scalar.numel() == 1 && scalar.scalar_type() == wanted, op, ": ", name,
                  " must be one number, float32 (of float64 tensors float64)");
  return contiguous(scalar);
}

double number(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double ? *static_cast<const double*>(scalar.data_ptr())
                                                    : *static_cast<const float*>(scalar.data_ptr());
}

// On the CPU: a quotient in the dtype that `like` accumulates in.
double quotient(double a, double b, const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? a / b : double(float(a) / float(b));
}

// `work(begin, end)` on parts of the rows, each of at least 64 KiB.
template <typename Work>
void in_parallel(int64_t rows, int64_t row_bytes, const Work& work) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, row_bytes)), work);
}

#ifdef EMU2_WITH_CUDA
// Calls `launch(stream)` on the device of a tensor.
template <typename Launch>
void on_device(const char* op, const Tensor& tensor, const Launch& launch) {
  using namespace torch::stable::accelerator;
  const DeviceGuard guard(tensor.get_device_index());
  const int error = launch(getCurrentStream(tensor.get_device_index()).nativeHandle());
  STD_TORCH_CHECK(error == 0, op, ": the kernel was not launched, CUDA error ", error);
}
#endif

Tensor interleave(const Tensor& text_, const Tensor& visual_, const Tensor& slot_) {
  const char* op = "emu2::interleave";
  const Tensor text = contiguous(text_), visual = contiguous(visual_), slot = checked_slot(op, slot_, text);
  check_device(op, text, visual);
  dtype_of(op, text);
  STD_TORCH_CHECK(visual.scalar_type() == text.scalar_type(), op, ": text and visual must have the same dtype");
  const int64_t rows = rows_of(text), row_bytes = width_of(op, text) * text.element_size();
  STD_TORCH_CHECK(visual.dim() == 2 && visual.size(1) == width_of(op, text), op, ": visual must be [rows, ",
                  width_of(op, text), "]");
  Tensor out = new_empty(text, shape_of(text));
  const auto* slots = static_cast<const int32_t*>(slot.data_ptr());
  if (text.is_cpu()) {
    namers(op, slot, visual.size(0));
    in_parallel(rows, row_bytes, [&](int64_t begin, int64_t end) {
      emu2_cpu_interleave(text.data_ptr(), visual.data_ptr(), slots, out.data_ptr(), begin, end, row_bytes);
    });
    return out;
  }
#ifdef EMU2_WITH_CUDA
  on_device(op, text, [&](void* stream) {
    return emu2_interleave(text.data_ptr(), visual.data_ptr(), slots, out.data_ptr(), rows, visual.size(0), row_bytes,
                           stream);
  });
#endif
  return out;
}

std::tuple<Tensor, Tensor> interleave_backward(const Tensor& gradient_, const Tensor& slot_, int64_t visual_rows) {
  const char* op = "emu2::interleave_backward";
  const Tensor gradient = contiguous(gradient_), slot = checked_slot(op, slot_, gradient);
  dtype_of(op, gradient);
  const int64_t width = width_of(op, gradient), rows = rows_of(gradient), row_bytes = width * gradient.element_size();
  Tensor text_gradient = new_empty(gradient, shape_of(gradient));
  const auto* slots = static_cast<const int32_t*>(slot.data_ptr());
  if (gradient.is_cpu()) {
    Tensor visual_gradient = new_empty(gradient, {visual_rows, width});
    auto* visual = static_cast<char*>(visual_gradient.data_ptr());
    const auto named_by = namers(op, slot, visual_rows);
    in_parallel(rows, row_bytes, [&](int64_t begin, int64_t end) {
      emu2_cpu_interleave_backward(gradient.data_ptr(), slots, text_gradient.data_ptr(), visual, begin, end, row_bytes);
    });
    for (int64_t row = 0; row < visual_rows; ++row) {
      if (named_by[row] < 0) std::fill_n(visual + row * row_bytes, row_bytes, 0);
    }
    return {text_gradient, visual_gradient};
  }
  // Which rows are named is known on the device alone.
  Tensor visual_gradient = torch::stable::new_zeros(gradient, {visual_rows, width});
#ifdef EMU2_WITH_CUDA
  on_device(op, gradient, [&](void* stream) {
    return emu2_interleave_backward(gradient.data_ptr(), slots, text_gradient.data_ptr(), visual_gradient.data_ptr(),
                                    rows, visual_rows, row_bytes, stream);
  });
#endif
  return {text_gradient, visual_gradient};
}

std::tuple<Tensor, Tensor> regression_loss(const Tensor& predicted_, const Tensor& target_, const Tensor& slot_,
                                           const Tensor& denominator_, const Tensor& gradient_scale_,
                                           bool needs_gradient) {
  const char* op = "emu2::regression_loss";
  const Tensor predicted = contiguous(predicted_), target = contiguous(target_);
  const Tensor slot = checked_slot(op, slot_, predicted);
  const Tensor denominator = checked_scalar(op, "denominator", denominator_, predicted);
  const Tensor gradient_scale = checked_scalar(op, "gradient_scale", gradient_scale_, predicted);
  check_device(op, predicted, target);
  const int dtype = dtype_of(op, predicted);
  STD_TORCH_CHECK(target.scalar_type() == predicted.scalar_type(), op, ": predicted and target must have the same dtype");
  const int64_t width = width_of(op, predicted), rows = rows_of(predicted);
  STD_TORCH_CHECK(target.dim() == 2 && target.size(1) == width, op, ": target must be [rows, ", width, "]");
  Tensor gradient = new_empty(predicted, needs_gradient ? shape_of(predicted) : std::vector<int64_t>{0});
  Tensor loss = new_empty(denominator, std::vector<int64_t>{});
  void* gradients = needs_gradient ? gradient.data_ptr() : nullptr;
  const auto* slots = static_cast<const int32_t*>(slot.data_ptr());
  if (predicted.is_cpu()) {
    for (int64_t n = 0; n < rows; ++n) {
      STD_TORCH_CHECK(slots[n] < target.size(0), op, ": slot ", n, " is ", slots[n], ", legal: negative, and rows below ",
                      target.size(0));
    }
    const double scale = number(gradient_scale);
    STD_TORCH_CHECK(scale != 0, op, ": a gradient_scale of 0 leaves no gradient to scale; legal: any other number");
    const double factor = quotient(2 * scale, number(denominator), predicted);
    std::vector<double> squares(rows);
    in_parallel(rows, width * predicted.element_size(), [&](int64_t begin, int64_t end) {
      emu2_cpu_regression_loss(predicted.data_ptr(), target.data_ptr(), slots, factor, gradients, squares.data(), begin,
                               end, width, dtype);
    });
    double sum = 0;  // in the order of the rows, whichever thread had them
    for (const double square : squares) sum += square;
    if (dtype == EMU2_F64) {
      *static_cast<double*>(loss.data_ptr()) = sum / number(denominator);
    } else {
      *static_cast<float*>(loss.data_ptr()) = float(sum / number(denominator));
    }
    return {loss, gradient};
  }
#ifdef EMU2_WITH_CUDA
  Tensor partial = new_empty(denominator, {rows});
  Tensor counter = torch::stable::new_zeros(slot, {1});
  on_device(op, predicted, [&](void* stream) {
    return emu2_regression_loss(predicted.data_ptr(), target.data_ptr(), slots,
                                static_cast<const float*>(denominator.data_ptr()),
                                static_cast<const float*>(gradient_scale.data_ptr()), gradients,
                                static_cast<float*>(partial.data_ptr()), static_cast<uint32_t*>(counter.data_ptr()),
                                static_cast<float*>(loss.data_ptr()), rows, target.size(0), width, dtype, stream);
  });
#endif
  return {loss, gradient};
}

Tensor rescale(const Tensor& gradient_, const Tensor& upstream_, const Tensor& folded_) {
  const char* op = "emu2::rescale";
  const Tensor gradient = contiguous(gradient_);
  const Tensor upstream = checked_scalar(op, "upstream", upstream_, gradient);
  const Tensor folded = checked_scalar(op, "folded", folded_, gradient);
  const int dtype = dtype_of(op, gradient);
  Tensor out = new_empty(gradient, shape_of(gradient));
  if (gradient.is_cpu()) {
    const double factor = quotient(number(upstream), number(folded), gradient);
    in_parallel(gradient.numel(), gradient.element_size(), [&](int64_t begin, int64_t end) {
      emu2_cpu_rescale(gradient.data_ptr(), factor, out.data_ptr(), begin, end, dtype);
    });
    return out;
  }
#ifdef EMU2_WITH_CUDA
  on_device(op, gradient, [&](void* stream) {
    return emu2_rescale(gradient.data_ptr(), static_cast<const float*>(upstream.data_ptr()),
                        static_cast<const float*>(folded.data_ptr()), out.data_ptr(), gradient.numel(), dtype, stream);
  });
#endif
  return out;
}

int64_t side_of(const char* op, const char* what, int64_t count) {
  const auto side = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(std::max<int64_t>(count, 0)))));
  STD_TORCH_CHECK(side > 0 && side * side == count, op, ": ", count, " ", what, " are no square");
  return side;
}

// Patches to a side, and the window that leaves `queries` of them.
std::tuple<int64_t, int64_t> windows(const char* op, int64_t patches, int64_t queries) {
  const int64_t side = side_of(op, "patches (without CLS)", patches - 1), across = side_of(op, "queries", queries);
  STD_TORCH_CHECK(side % across == 0, op, ": ", across, " windows to a side do not divide ", side, " patches");
  return {side, side / across};
}

void check_pair(const char* op, int a, int b) {
  STD_TORCH_CHECK((a == EMU2_F64) == (b == EMU2_F64), op, ": float64 is pooled to float64 alone");
}

Tensor pool(const Tensor& hidden_, int64_t queries, ScalarType out_type) {
  const char* op = "emu2::pool";
  const Tensor hidden = contiguous(hidden_);
  STD_TORCH_CHECK(hidden.dim() == 3, op, ": hidden must be [images, patches, width]");
  const int dtype = dtype_of(op, hidden), out_dtype = dtype_of(op, out_type, hidden);
  check_pair(op, dtype, out_dtype);
  const int64_t images = hidden.size(0), width = hidden.size(2);
  const auto [side, window] = windows(op, hidden.size(1), queries);
  Tensor out = new_empty(hidden, {images, queries, width}, out_type);
  if (hidden.is_cpu()) {
    in_parallel(images * queries, window * window * width * hidden.element_size(),
                [&, side = side, window = window](int64_t begin, int64_t end) {
                  emu2_cpu_pool(hidden.data_ptr(), out.data_ptr(), begin, end, side, window, width, dtype, out_dtype);
                });
    return out;
  }
#ifdef EMU2_WITH_CUDA
  on_device(op, hidden, [&, side = side, window = window](void* stream) {
    return emu2_pool(hidden.data_ptr(), out.data_ptr(), images, side, window, width, dtype, out_dtype, stream);
  });
#endif
  return out;
}

Tensor pool_backward(const Tensor& gradient_, int64_t patches, ScalarType type) {
  const char* op = "emu2::pool_backward";
  const Tensor gradient = contiguous(gradient_);
  STD_TORCH_CHECK(gradient.dim() == 3, op, ": gradient must be [images, queries, width]");
  const int dtype = dtype_of(op, type, gradient), out_dtype = dtype_of(op, gradient);
  check_pair(op, dtype, out_dtype);
  const int64_t images = gradient.size(0), queries = gradient.size(1), width = gradient.size(2);
  const auto [side, window] = windows(op, patches, queries);
  Tensor out = new_empty(gradient, {images, patches, width}, type);
  if (gradient.is_cpu()) {
    in_parallel(images * queries, window * window * width * out.element_size(),
                [&, side = side, window = window](int64_t begin, int64_t end) {
                  emu2_cpu_pool_backward(gradient.data_ptr(), out.data_ptr(), begin, end, side, window, width, dtype,
                                         out_dtype);
                });
    return out;
  }
#ifdef EMU2_WITH_CUDA
  on_device(op, gradient, [&, side = side, window = window](void* stream) {
    return emu2_pool_backward(gradient.data_ptr(), out.data_ptr(), images, side, window, width, dtype, out_dtype,
                              stream);
  });
#endif
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(emu2, library) {
  library.def("interleave(Tensor text, Tensor visual, Tensor slot) -> Tensor");
  library.def("interleave_backward(Tensor gradient, Tensor slot, SymInt visual_rows) -> (Tensor, Tensor)");
  library.def(
      "regression_loss(Tensor predicted, Tensor target, Tensor slot, Tensor denominator, Tensor gradient_scale, "
      "bool needs_gradient) -> (Tensor, Tensor)");
  library.def("rescale(Tensor gradient, Tensor upstream, Tensor folded) -> Tensor");
  library.def("pool(Tensor hidden, SymInt queries, ScalarType dtype) -> Tensor");
  library.def("pool_backward(Tensor gradient, SymInt patches, ScalarType dtype) -> Tensor");
}

#define EMU2_IMPLEMENT(library)                                              \
  library.impl("interleave", TORCH_BOX(&interleave));                        \
  library.impl("interleave_backward", TORCH_BOX(&interleave_backward));      \
  library.impl("regression_loss", TORCH_BOX(&regression_loss));              \
  library.impl("rescale", TORCH_BOX(&rescale));                              \
  library.impl("pool", TORCH_BOX(&pool));                                    \
  library.impl("pool_backward", TORCH_BOX(&pool_backward))

STABLE_TORCH_LIBRARY_IMPL(emu2, CPU, library) { EMU2_IMPLEMENT(library); }
#ifdef EMU2_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(emu2, CUDA, library) { EMU2_IMPLEMENT(library); }
#endif
