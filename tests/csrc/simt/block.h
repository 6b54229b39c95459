// One block of threads: who waits for whom.
#pragma once
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

// What one launch's blocks share.
struct Launch {
  std::function<void()> body;
  Size grid_size, block_size;
  uint64_t seed = 0;
  std::mt19937_64 random;
  bool stopped = false;

  void stop(const std::string& report);  // the first one counts
};

enum class Wait { kNothing, kBlock, kWarp, kEnded };

struct Thread : Lane {
  class Block* home = nullptr;
  Fiber* fiber = nullptr;
  int index = 0;  // in the block
  Wait wait = Wait::kNothing;
  const char* where = "";

  // What it brought to the warp's operation, and what it gets.
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  int source = 0;  // lane
  bool predicate = false;
  unsigned warp_operations = 0;

  bool fenced = false;
  const void* last_atomic = nullptr;
};

class Block {
 public:
  Block(Launch& launch, Size index);

  bool ended() const { return live == 0; }
  // Runs some of the threads that can run, in the order of the launch's seed. Stops the launch if none can.
  void run();

  // From inside the running thread.
  void wait_for_block(Thread& self, const char* where);
  uint64_t wait_for_warp(Thread& self, uint32_t mask, const char* where, bool ordered);
  [[noreturn]] void fail(Thread& self, const std::string& what);

 private:
  static void body(void* thread);
  void open_barrier();
  bool warp_complete(Thread& self);
  void pause(Thread& self, Wait wait, const char* where);
  std::string waiting() const;

  Launch& launch;
  std::vector<Thread> threads;
  std::vector<int> order;
  int live, at_barrier = 0;
  unsigned barriers = 0;
  // Tags of the race detector. Two of each, taken in turns: who is late at one barrier must not see the next one.
  char begin_tag = 0, end_tag = 0, barrier_tags[2] = {};
  std::vector<char> warp_tags;
};

extern thread_local Thread* running;

}  // namespace simt
