#include "block.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "sanitizers.h"

namespace simt {

thread_local Thread* running = nullptr;

Block::Block(Launch& launch, Size index)
    : launch(launch),
      threads(launch.block_size.x * launch.block_size.y * launch.block_size.z),
      order(threads.size()),
      live(int(threads.size())),
      warp_tags(2 * (threads.size() / kWarp + 1)) {
  const Size size = launch.block_size;
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.thread = Size(i % size.x, i / size.x % size.y, i / size.x / size.y);
    thread.block = index;
    thread.block_size = size;
    thread.grid_size = launch.grid_size;
    thread.home = this;
    thread.index = int(i);
    thread.fiber = Fiber::make(body, &thread);
  }
  std::iota(order.begin(), order.end(), 0);
  if (launch.seed == 1) std::reverse(order.begin(), order.end());
}

void Block::body(void* argument) {
  Thread& self = *static_cast<Thread*>(argument);
  acquire(&self.home->begin_tag);
  self.home->launch.body();
  release(&self.home->end_tag);
  self.wait = Wait::kEnded;
  Block& home = *self.home;
  --home.live;
  if (home.live > 0 && home.at_barrier == home.live) home.open_barrier();  // the others waited for this one only
}

void Block::run() {
  release(&begin_tag);
  auto& random = launch.random;
  size_t budget = threads.size();
  if (launch.seed >= 2) {
    std::shuffle(order.begin(), order.end(), random);
    budget = 1 + random() % budget;
  }
  bool any = false;
  for (int i : order) {
    if (threads[i].wait != Wait::kNothing) continue;
    if (budget-- == 0) break;
    any = true;
    running = &threads[i];
    threads[i].fiber->resume();
    running = nullptr;
    if (launch.stopped) return;
  }
  if (!any && live > 0) launch.stop("divergence: nobody can go on;" + waiting());
  if (live == 0) acquire(&end_tag);
}

std::string Block::waiting() const {
  std::string text;
  int shown = 0;
  for (const Thread& thread : threads) {
    if (thread.wait == Wait::kNothing || thread.wait == Wait::kEnded || ++shown > 4) continue;
    text += " thread " + std::to_string(thread.index) + " waits at " + thread.where + ";";
  }
  return text;
}

void Block::fail(Thread& self, const std::string& what) {
  launch.stop(what + ", thread " + std::to_string(self.index) + " of block " + std::to_string(self.block.x));
  self.fiber->pause();
  std::abort();
}

void Block::pause(Thread& self, Wait wait, const char* where) {
  self.wait = wait;
  self.where = where;
  self.fiber->pause();
}

void Block::wait_for_block(Thread& self, const char* where) {
  const void* tag = &barrier_tags[barriers % 2];
  release(tag);
  self.wait = Wait::kBlock;
  self.where = where;
  if (++at_barrier == live) {
    open_barrier();
  } else {
    self.fiber->pause();
  }
  acquire(tag);
}

void Block::open_barrier() {
  const char* where = nullptr;
  for (Thread& thread : threads) {
    if (thread.wait != Wait::kBlock) continue;
    if (where == nullptr) where = thread.where;
    if (std::strcmp(where, thread.where) != 0) {
      launch.stop("divergence: threads meet in different barriers;" + waiting());
    }
    thread.wait = Wait::kNothing;
  }
  at_barrier = 0;
  ++barriers;
}

uint64_t Block::wait_for_warp(Thread& self, uint32_t mask, const char* where, bool ordered) {
  const int warp = self.index / kWarp, lane = self.index % kWarp;
  if ((mask >> lane & 1) == 0) fail(self, std::string("mask: a lane calls that is not in it, ") + where);
  const void* tag = &warp_tags[2 * warp + self.warp_operations++ % 2];
  if (ordered) release(tag);
  self.mask = mask;
  self.wait = Wait::kWarp;
  self.where = where;
  if (!warp_complete(self)) self.fiber->pause();
  if (ordered) acquire(tag);
  return self.result;
}

// Whether all lanes of the mask are there. If so they have their results and can go on.
bool Block::warp_complete(Thread& self) {
  const int first = self.index / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((self.mask >> lane & 1) == 0) continue;
    if (first + lane >= int(threads.size()) || threads[first + lane].wait == Wait::kEnded) {
      fail(self, std::string("mask: names a lane that does not run, ") + self.where);
    }
    const Thread& other = threads[first + lane];
    if (other.wait != Wait::kWarp) return false;
    if (other.mask != self.mask) fail(self, std::string("mask: lanes have different ones, ") + self.where);
    if (std::strcmp(other.where, self.where) != 0) {
      fail(self, std::string("divergence: lanes of a warp meet in ") + self.where + " and " + other.where);
    }
  }
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (self.mask >> lane & 1) votes |= uint32_t(threads[first + lane].predicate) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((self.mask >> lane & 1) == 0) continue;
    Thread& thread = threads[first + lane];
    if (thread.source < 0) {
      thread.result = votes;
    } else if (self.mask >> thread.source & 1) {
      thread.result = threads[first + thread.source].value;
    } else {
      fail(self, std::string("shuffle: reads a lane outside the mask, ") + self.where);
    }
    thread.wait = Wait::kNothing;
  }
  return true;
}

}  // namespace simt
