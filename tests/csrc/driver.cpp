// Calls every kernel with buffers of exactly the size that csrc/cuda/kernels.h asks for, for the sanitizers to watch.
//
//   driver MULTIPROCESSORS SEED < cases
//
// A case is a line: `rows DTYPE ROWS VISUAL_ROWS WIDTH OFFSETS(3)`, `windows DTYPE OUT_DTYPE IMAGES SIDE WINDOW WIDTH
// OFFSETS(2)`, `rescale DTYPE ELEMENTS OFFSETS(2)` (by how many elements each matrix starts beside an aligned address)
// or `far WIDTH ROW` (one visual row, very far behind the others). Ends with 1 and the emulator's report if that
// stopped a kernel.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "simt/simt.h"

namespace {

int64_t size_of(int dtype) { return dtype == EMU2_F32 ? 4 : 2; }

// `bytes` bytes that end where the allocation does, `before` bytes behind an aligned address. All values are small.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t before = 0) : start(std::malloc(size_t(bytes + before))), before(before) {
    std::memset(start, 0x3c, size_t(bytes + before));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(start); }
  template <typename T = void>
  T* get() {
    return reinterpret_cast<T*>(static_cast<char*>(start) + before);
  }

 private:
  void* start;
  int64_t before;
};

void must(int code) {
  if (code == 0) return;
  std::printf("simt: %s (%d)\n", simt_report(), code);
  std::exit(1);
}

void rows(int dtype, int64_t rows, int64_t visual_rows, int64_t width, const int64_t* offset) {
  const int64_t size = size_of(dtype), row_bytes = width * size;
  Buffer slot(rows * 4);
  int64_t next = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const bool text = i % 3 == 1 || next == visual_rows;
    slot.get<int32_t>()[i] = text ? (i % 2 ? EMU2_TEXT : EMU2_NOTHING) : int32_t(next++);
  }
  Buffer text(rows * row_bytes, offset[0] * size), visual(visual_rows * row_bytes, offset[1] * size);
  Buffer out(rows * row_bytes, offset[2] * size);
  const auto* slots = slot.get<int32_t>();
  must(emu2_interleave(text.get(), visual.get(), slots, out.get(), rows, visual_rows, row_bytes, nullptr));
  must(emu2_interleave_backward(out.get(), slots, text.get(), visual.get(), rows, visual_rows, row_bytes, nullptr));
  Buffer numbers(8), partial(rows * 4), counter(4), loss(4);
  numbers.get<float>()[0] = numbers.get<float>()[1] = 2.0f;
  *counter.get<uint32_t>() = 0;
  for (void* gradient : {out.get(), static_cast<void*>(nullptr)}) {
    must(emu2_regression_loss(text.get(), visual.get(), slots, numbers.get<float>(), numbers.get<float>() + 1, gradient,
                              partial.get<float>(), counter.get<uint32_t>(), loss.get<float>(), rows, visual_rows,
                              width, dtype, nullptr));
  }
}

void windows(int dtype, int out_dtype, int64_t images, int64_t side, int64_t window, int64_t width,
             const int64_t* offset) {
  const int64_t across = side / window;
  Buffer hidden(images * (1 + side * side) * width * size_of(dtype), offset[0] * size_of(dtype));
  Buffer out(images * across * across * width * size_of(out_dtype), offset[1] * size_of(out_dtype));
  must(emu2_pool(hidden.get(), out.get(), images, side, window, width, dtype, out_dtype, nullptr));
  must(emu2_pool_backward(out.get(), hidden.get(), images, side, window, width, dtype, out_dtype, nullptr));
}

void rescale(int dtype, int64_t elements, const int64_t* offset) {
  const int64_t size = size_of(dtype);
  Buffer gradient(elements * size, offset[0] * size), out(elements * size, offset[1] * size);
  Buffer numbers(8);
  numbers.get<float>()[0] = numbers.get<float>()[1] = 2.0f;
  must(emu2_rescale(gradient.get(), numbers.get<float>(), numbers.get<float>() + 1, out.get(), elements, dtype,
                    nullptr));
}

// Only the last row has memory: the bytes before it are addresses.
void far(int64_t width, int32_t row) {
  const int64_t page = 4096, size = 4, bytes = (row + 1) * width * size, reserved = (bytes + page - 1) / page * page;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* start = static_cast<char*>(mmap(nullptr, size_t(reserved), PROT_NONE, flags, -1, 0));
  const int64_t used = row * width * size / page * page;
  if (start == MAP_FAILED) std::abort();
  if (mprotect(start + used, size_t(reserved - used), PROT_READ | PROT_WRITE) != 0) std::abort();
  Buffer text(width * size), out(width * size), numbers(8), partial(4), counter(4), loss(4);
  numbers.get<float>()[0] = numbers.get<float>()[1] = 2.0f;
  *counter.get<uint32_t>() = 0;
  must(emu2_interleave(text.get(), start, &row, out.get(), 1, row + 1, width * size, nullptr));
  must(emu2_interleave_backward(text.get(), &row, out.get(), start, 1, row + 1, width * size, nullptr));
  must(emu2_regression_loss(text.get(), start, &row, numbers.get<float>(), numbers.get<float>() + 1, out.get(),
                            partial.get<float>(), counter.get<uint32_t>(), loss.get<float>(), 1, row + 1, width,
                            EMU2_F32, nullptr));
  munmap(start, size_t(reserved));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  simt_configure(std::atoi(arguments[1]), std::strtoull(arguments[2], nullptr, 10));
  std::string kind;
  int64_t n[8];
  const auto read = [&](int values) {
    for (int i = 0; i < values; ++i) std::cin >> n[i];
  };
  while (std::cin >> kind) {
    if (kind == "rows") {
      read(7);
      rows(int(n[0]), n[1], n[2], n[3], n + 4);
    } else if (kind == "windows") {
      read(8);
      windows(int(n[0]), int(n[1]), n[2], n[3], n[4], n[5], n + 6);
    } else if (kind == "far") {
      read(2);
      far(n[0], int32_t(n[1]));
    } else {
      read(4);
      rescale(int(n[0]), n[1], n + 2);
    }
  }
  return std::cin.eof() ? 0 : 2;
}
