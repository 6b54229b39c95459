// What a thread of a kernel can do, on a CPU. Every CUDA thread is a fiber; the fibers of a block share an OS thread,
// and of all blocks one runs at a time, a few fibers' worth, in an order that a seed decides.
//
// Not here: memory that other SMs see late (the race detector stands in: what no barrier or fence orders is reported),
// caches, asynchronous copies, clusters, time.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace simt {

constexpr int kWarp = 32;

struct Size {
  unsigned x, y, z;
  Size(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Lane {
  Size thread, block, block_size, grid_size;
};

// The thread that runs now.
Lane& lane();

// threadIdx and its like: members that are looked up when they are read.
template <Size Lane::* kMember>
struct Coordinates {
  template <unsigned Size::* kAxis>
  struct Coordinate {
    operator unsigned() const { return lane().*kMember.*kAxis; }
  };
  Coordinate<&Size::x> x;
  Coordinate<&Size::y> y;
  Coordinate<&Size::z> z;
};

struct Settings {
  int multiprocessors = 2;  // of the device, each holding one block
  uint64_t seed = 0;        // of the schedule: 0 runs threads and blocks in order, 1 backwards, others at random
};
Settings& settings();

// False when the kernel was stopped; report() says why. A launch starts with an empty report.
bool launch(Size grid, Size block, size_t dynamic_shared_bytes, const void* kernel, std::function<void()> body);

// Stops the launch. `what` is one of the words that report() can begin with: trap, divergence, mask, shuffle.
[[noreturn]] void fail(const char* what, const char* where);

void block_barrier(const char* where);
void warp_barrier(uint32_t mask, const char* where);
uint32_t ballot(uint32_t mask, bool predicate, const char* where);

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle_bits(const char* where, Shuffle kind, uint32_t mask, uint64_t value, int argument, int width);

template <typename T>
T shuffle(const char* where, Shuffle kind, uint32_t mask, T value, int argument, int width = kWarp) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(where, kind, mask, bits, argument, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint32_t first_of(uint32_t mask, ...) { return mask; }

// For the race detector: a fence before an atomic publishes what its thread did, one behind it takes over what was
// published there.
void fence();
void before_atomic(const void* address);
void after_atomic(const void* address);

}  // namespace simt

extern "C" {
// For callers from outside: settings of the following launches, and what the last one that was stopped said.
void simt_configure(int multiprocessors, uint64_t seed);
const char* simt_report();
}
