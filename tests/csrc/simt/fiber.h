// A stack that can be left and taken up again.
#pragma once
#include <ucontext.h>

#include <cstddef>

namespace simt {

class Fiber {
 public:
  // Runs body(argument) when it is first resumed. Fibers of earlier launches are used again, in the same order: call
  // forget_all() between launches.
  static Fiber* make(void (*body)(void*), void* argument);
  static void forget_all();

  void resume();  // from the OS thread's own stack; comes back when the fiber pauses or ends
  void pause();   // from inside

 private:
  static void start(unsigned low, unsigned high);

  ucontext_t inside, outside;
  void* stack = nullptr;
  void* outer_tsan = nullptr;
  void* tsan = nullptr;
  void* inner_asan = nullptr;
  void* outer_asan = nullptr;
  const void* outer_stack = nullptr;
  size_t outer_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

}  // namespace simt
