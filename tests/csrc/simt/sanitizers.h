// What the sanitizers have to be told about fibers and synchronisation. The emulator itself is never compiled with
// -fsanitize=thread (its state would be reported as races); SIMT_THREAD_SANITIZER says that the kernels are.
#pragma once
#include <cstddef>

#if defined(SIMT_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

// What happened before release(tag) happened before what comes after a later acquire(tag).
inline void release([[maybe_unused]] const void* tag) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_release(const_cast<void*>(tag));
#endif
}
inline void acquire([[maybe_unused]] const void* tag) {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_acquire(const_cast<void*>(tag));
#endif
}

inline void forbid([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory, bytes);
#endif
}
inline void allow([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace simt
