#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "sanitizers.h"

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kMost = 7000;  // the race detector has room for some 8000

std::vector<std::unique_ptr<Fiber>> all;
size_t used = 0;

}  // namespace

Fiber* Fiber::make(void (*body)(void*), void* argument) {
  if (used == all.size()) {
    if (used == kMost) {
      std::fprintf(stderr, "simt: more than %zu threads in one launch\n", kMost);
      std::abort();
    }
    auto fresh = std::make_unique<Fiber>();
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    fresh->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (fresh->stack == MAP_FAILED) std::abort();
#if defined(SIMT_THREAD_SANITIZER)
    fresh->tsan = __tsan_create_fiber(0);
#endif
    all.push_back(std::move(fresh));
  }
  Fiber* fiber = all[used++].get();
  allow(fiber->stack, kStackBytes);  // a fiber that was stopped half-way has left frames there
  fiber->body = body;
  fiber->argument = argument;
  fiber->inner_asan = nullptr;
  getcontext(&fiber->inside);
  fiber->inside.uc_stack.ss_sp = fiber->stack;
  fiber->inside.uc_stack.ss_size = kStackBytes;
  fiber->inside.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(fiber);  // makecontext hands on nothing wider than int
  makecontext(&fiber->inside, reinterpret_cast<void (*)()>(start), 2, unsigned(address), unsigned(address >> 32));
  return fiber;
}

void Fiber::forget_all() { used = 0; }

void Fiber::start(unsigned low, unsigned high) {
  auto* fiber = reinterpret_cast<Fiber*>(uintptr_t(high) << 32 | low);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &fiber->outer_stack, &fiber->outer_bytes);
#endif
  fiber->body(fiber->argument);
  fiber->pause();
  std::abort();  // resumed behind its end
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&outer_asan, stack, kStackBytes);
#endif
#if defined(SIMT_THREAD_SANITIZER)
  outer_tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan, 1);  // 1: switching orders nothing
#endif
  swapcontext(&outside, &inside);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(outer_asan, nullptr, nullptr);
#endif
}

void Fiber::pause() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&inner_asan, outer_stack, outer_bytes);
#endif
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(outer_tsan, 1);
#endif
  swapcontext(&inside, &outside);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(inner_asan, &outer_stack, &outer_bytes);
#endif
}

}  // namespace simt
