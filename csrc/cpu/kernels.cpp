// Plain loops that the compiler vectorises, once for each level of x86-64; the loader picks the one the CPU can run.
//
// Every level must give the same bits. So sums have a fixed number of accumulators, whatever a register holds, the file
// is compiled with -ffp-contract=off (one level has fused multiply-adds, another has not), and 16-bit floats are
// converted by integer arithmetic.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(EMU2_ONE_LEVEL) || !defined(__x86_64__) || !defined(__GLIBC__) || defined(__clang__) || __GNUC__ < 12
#define LEVELS  // one level: what the compiler's flags say
#else
#define LEVELS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#define INLINE inline __attribute__((always_inline))  // into each level, or it would be compiled for the lowest

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int LANES = 32;

INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

INLINE double load(double x) { return x; }
INLINE float load(float x) { return x; }
INLINE float load(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
INLINE float load(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t normal = magnitude + (112u << 23);  // 127 - 15 is what the exponents' biases differ by
  // A subnormal m * 2^-24 is 2^-14 with m as mantissa, less 2^-14.
  const uint32_t subnormal = as_bits(as_float(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t special = magnitude | 0x7f800000;  // infinite, or not a number
  const uint32_t bits = magnitude < 0x00800000 ? subnormal : magnitude < 0x0f800000 ? normal : special;
  return as_float(bits | sign);
}

// To the nearest, ties to even.
INLINE void store(double value, double& out) { out = value; }
INLINE void store(float value, float& out) { out = value; }
INLINE void store(float value, BFloat16& out) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}
INLINE void store(float value, Half& out) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // In a number from 0.5 to 1 the last bit of the mantissa stands for 2^-24, as in a subnormal: the addition rounds.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // not a number; too large, or infinite
  const uint32_t rounded = magnitude < (113u << 23) ? subnormal : magnitude < (143u << 23) ? normal : special;
  out.bits = uint16_t(rounded | (bits >> 16 & 0x8000));
}

// Writes rows; where there are many of them, past the caches: an ordinary store first reads the line it is going to
// overwrite, and what it leaves in the cache has been displaced by the end of the output.
class Writer {
 public:
  explicit Writer(int64_t bytes) : past_caches_(bytes > (4 << 20)) {}

#ifdef __SSE2__
  ~Writer() {
    if (past_caches_) _mm_sfence();
  }

  void copy(void* to, const void* from, int64_t bytes) const {
    const int64_t start = head(to, bytes), stop = start + (bytes - start) / 16 * 16;
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
    memcpy(out, in, start);
    for (int64_t i = start; i < stop; i += 16) {
      const __m128i block = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), block);
    }
    memcpy(out + stop, in + stop, bytes - stop);
  }

  void zero(void* to, int64_t bytes) const {
    const int64_t start = head(to, bytes), stop = start + (bytes - start) / 16 * 16;
    char* out = static_cast<char*>(to);
    memset(out, 0, start);
    for (int64_t i = start; i < stop; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_setzero_si128());
    }
    memset(out + stop, 0, bytes - stop);
  }

 private:
  // Bytes before the first that is aligned to 16; all of them, if caches are to be used.
  int64_t head(const void* to, int64_t bytes) const {
    return past_caches_ ? std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 15) : bytes;
  }
#else
  void copy(void* to, const void* from, int64_t bytes) const { memcpy(to, from, bytes); }
  void zero(void* to, int64_t bytes) const { memset(to, 0, bytes); }

 private:
#endif
  bool past_caches_;
};

// Adds squares of differences to LANES sums, and writes the gradient.
template <typename T, bool WITH_GRADIENT>
INLINE void add_squares(const T* __restrict predicted, const T* __restrict target, T* __restrict gradient,
                        int64_t count, Accumulator<T> factor, Accumulator<T>* __restrict sums) {
  int64_t start = 0;
  for (; start + LANES <= count; start += LANES) {
    for (int lane = 0; lane < LANES; ++lane) {
      const Accumulator<T> error = load(predicted[start + lane]) - load(target[start + lane]);
      sums[lane] += error * error;
      if (WITH_GRADIENT) store(factor * error, gradient[start + lane]);
    }
  }
  for (int64_t i = start; i < count; ++i) {
    const Accumulator<T> error = load(predicted[i]) - load(target[i]);
    sums[i - start] += error * error;
    if (WITH_GRADIENT) store(factor * error, gradient[i]);
  }
}

template <typename T>
INLINE void regression_loss(const void* predicted_rows, const void* target_rows, const int32_t* slot, double factor,
                            void* gradient_rows, double* squares, int64_t begin, int64_t end, int64_t width) {
  constexpr int64_t BLOCK = 32 * LANES;  // what is written past the caches comes from the nearest one
  const Writer writer((end - begin) * width * sizeof(T));
  T block[BLOCK];
  for (int64_t n = begin; n < end; ++n) {
    const T* predicted = static_cast<const T*>(predicted_rows) + n * width;
    T* gradient = gradient_rows ? static_cast<T*>(gradient_rows) + n * width : nullptr;
    if (slot[n] < 0) {
      squares[n] = 0;
      if (gradient) writer.zero(gradient, width * sizeof(T));
      continue;
    }
    const T* target = static_cast<const T*>(target_rows) + slot[n] * width;
    Accumulator<T> sums[LANES] = {};
    for (int64_t start = 0; start < width; start += BLOCK) {
      const int64_t count = std::min(BLOCK, width - start);
      if (gradient) {
        add_squares<T, true>(predicted + start, target + start, block, count, factor, sums);
        writer.copy(gradient + start, block, count * sizeof(T));
      } else {
        add_squares<T, false>(predicted + start, target + start, nullptr, count, factor, sums);
      }
    }
    for (int half = LANES / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    squares[n] = sums[0];
  }
}

template <typename T>
INLINE void rescale(const void* gradient, double factor, void* out, int64_t begin, int64_t end) {
  const T* __restrict in = static_cast<const T*>(gradient);
  T* __restrict scaled = static_cast<T*>(out);
  const Accumulator<T> by = factor;
  for (int64_t i = begin; i < end; ++i) store(load(in[i]) * by, scaled[i]);
}

template <typename T>
INLINE void add(const void* row, Accumulator<T>* __restrict sums, int64_t width) {
  const T* __restrict values = static_cast<const T*>(row);
  for (int64_t i = 0; i < width; ++i) sums[i] += load(values[i]);
}

template <typename T>
INLINE void divide(const Accumulator<T>* __restrict sums, Accumulator<T> by, void* row, int64_t width) {
  T* __restrict values = static_cast<T*>(row);
  for (int64_t i = 0; i < width; ++i) store(sums[i] / by, values[i]);
}

// Each kernel at every level, by name and dtype.
#define AT_EVERY_LEVEL(SUFFIX, T)                                                                                     \
  LEVELS void regression_loss_##SUFFIX(const void* predicted, const void* target, const int32_t* slot, double factor, \
                                       void* gradient, double* squares, int64_t begin, int64_t end, int64_t width) { \
    regression_loss<T>(predicted, target, slot, factor, gradient, squares, begin, end, width);                        \
  }                                                                                                                   \
  LEVELS void rescale_##SUFFIX(const void* gradient, double factor, void* out, int64_t begin, int64_t end) {          \
    rescale<T>(gradient, factor, out, begin, end);                                                                    \
  }                                                                                                                   \
  LEVELS void add_##SUFFIX(const void* row, Accumulator<T>* sums, int64_t width) { add<T>(row, sums, width); }        \
  LEVELS void divide_##SUFFIX(const Accumulator<T>* sums, Accumulator<T> by, void* row, int64_t width) {              \
    divide<T>(sums, by, row, width);                                                                                  \
  }
}  // namespace
namespace emu2 {  // not anonymous: the loader's choice between levels needs a symbol
AT_EVERY_LEVEL(f32, float)
AT_EVERY_LEVEL(f16, Half)
AT_EVERY_LEVEL(bf16, BFloat16)
AT_EVERY_LEVEL(f64, double)

void add_row(const void* row, float* sums, int64_t width, int dtype) {
  (dtype == EMU2_F32 ? add_f32 : dtype == EMU2_F16 ? add_f16 : add_bf16)(row, sums, width);
}
void add_row(const void* row, double* sums, int64_t width, int) { add_f64(row, sums, width); }

void divide_row(const float* sums, float by, void* row, int64_t width, int dtype) {
  (dtype == EMU2_F32 ? divide_f32 : dtype == EMU2_F16 ? divide_f16 : divide_bf16)(sums, by, row, width);
}
void divide_row(const double* sums, double by, void* row, int64_t width, int) { divide_f64(sums, by, row, width); }

int64_t bytes_of(int dtype) { return dtype == EMU2_F64 ? 8 : dtype == EMU2_F32 ? 4 : 2; }

// The patches of window number `row`, as rows of [images, 1 + side * side, width].
template <typename Visit>
void for_patches(int64_t row, int64_t side, int64_t window, const Visit& visit) {
  const int64_t across = side / window, image = row / (across * across), place = row % (across * across);
  const int64_t first = image * (1 + side * side) + 1 + place / across * window * side + place % across * window;
  for (int64_t y = 0; y < window; ++y) {
    for (int64_t x = 0; x < window; ++x) visit(first + y * side + x);
  }
}

template <typename A>
void pool(const char* hidden, char* out, int64_t begin, int64_t end, int64_t side, int64_t window, int64_t width,
          int dtype, int out_dtype) {
  const int64_t row_bytes = width * bytes_of(dtype), out_bytes = width * bytes_of(out_dtype);
  std::vector<A> sums(width);
  for (int64_t row = begin; row < end; ++row) {
    std::fill(sums.begin(), sums.end(), A(0));
    for_patches(row, side, window, [&](int64_t patch) { add_row(hidden + patch * row_bytes, sums.data(), width, dtype); });
    divide_row(sums.data(), A(window * window), out + row * out_bytes, width, out_dtype);
  }
}

template <typename A>
void pool_backward(const char* gradient, char* hidden_gradient, int64_t begin, int64_t end, int64_t side,
                   int64_t window, int64_t width, int dtype, int out_dtype) {
  const int64_t row_bytes = width * bytes_of(dtype), out_bytes = width * bytes_of(out_dtype);
  const int64_t windows = side / window * (side / window);
  std::vector<A> values(width);
  std::vector<char> shared(row_bytes);
  for (int64_t row = begin; row < end; ++row) {
    std::fill(values.begin(), values.end(), A(0));
    add_row(gradient + row * out_bytes, values.data(), width, out_dtype);
    divide_row(values.data(), A(window * window), shared.data(), width, dtype);
    for_patches(row, side, window,
                [&](int64_t patch) { memcpy(hidden_gradient + patch * row_bytes, shared.data(), row_bytes); });
    if (row % windows == 0) memset(hidden_gradient + row / windows * (1 + side * side) * row_bytes, 0, row_bytes);
  }
}

}  // namespace emu2

extern "C" {

void emu2_cpu_interleave(const void* text, const void* visual, const int32_t* slot, void* out, int64_t begin,
                         int64_t end, int64_t row_bytes) {
  const Writer writer((end - begin) * row_bytes);
  for (int64_t i = begin; i < end; ++i) {
    char* row = static_cast<char*>(out) + i * row_bytes;
    if (slot[i] >= 0) {
      writer.copy(row, static_cast<const char*>(visual) + slot[i] * row_bytes, row_bytes);
    } else if (slot[i] == EMU2_TEXT) {
      writer.copy(row, static_cast<const char*>(text) + i * row_bytes, row_bytes);
    } else {
      writer.zero(row, row_bytes);
    }
  }
}

void emu2_cpu_interleave_backward(const void* gradient, const int32_t* slot, void* text_gradient,
                                  void* visual_gradient, int64_t begin, int64_t end, int64_t row_bytes) {
  const Writer writer((end - begin) * row_bytes);
  for (int64_t i = begin; i < end; ++i) {
    const char* row = static_cast<const char*>(gradient) + i * row_bytes;
    char* text_row = static_cast<char*>(text_gradient) + i * row_bytes;
    if (slot[i] == EMU2_TEXT) {
      writer.copy(text_row, row, row_bytes);
      continue;
    }
    writer.zero(text_row, row_bytes);
    if (slot[i] >= 0) writer.copy(static_cast<char*>(visual_gradient) + slot[i] * row_bytes, row, row_bytes);
  }
}

void emu2_cpu_regression_loss(const void* predicted, const void* target, const int32_t* slot, double factor,
                              void* gradient, double* squares, int64_t begin, int64_t end, int64_t width, int dtype) {
  using namespace emu2;
  const auto kernel = dtype == EMU2_F32   ? regression_loss_f32
                      : dtype == EMU2_F16 ? regression_loss_f16
                      : dtype == EMU2_F64 ? regression_loss_f64
                                          : regression_loss_bf16;
  kernel(predicted, target, slot, factor, gradient, squares, begin, end, width);
}

void emu2_cpu_rescale(const void* gradient, double factor, void* out, int64_t begin, int64_t end, int dtype) {
  using namespace emu2;
  const auto kernel = dtype == EMU2_F32   ? rescale_f32
                      : dtype == EMU2_F16 ? rescale_f16
                      : dtype == EMU2_F64 ? rescale_f64
                                          : rescale_bf16;
  kernel(gradient, factor, out, begin, end);
}

void emu2_cpu_pool(const void* hidden, void* out, int64_t begin, int64_t end, int64_t side, int64_t window,
                   int64_t width, int dtype, int out_dtype) {
  const auto kernel = dtype == EMU2_F64 ? emu2::pool<double> : emu2::pool<float>;
  kernel(static_cast<const char*>(hidden), static_cast<char*>(out), begin, end, side, window, width, dtype, out_dtype);
}

void emu2_cpu_pool_backward(const void* gradient, void* hidden_gradient, int64_t begin, int64_t end, int64_t side,
                            int64_t window, int64_t width, int dtype, int out_dtype) {
  const auto kernel = dtype == EMU2_F64 ? emu2::pool_backward<double> : emu2::pool_backward<float>;
  kernel(static_cast<const char*>(gradient), static_cast<char*>(hidden_gradient), begin, end, side, window, width,
         dtype, out_dtype);
}

}  // extern "C"
