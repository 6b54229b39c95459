// Launches, and the operations of simt.h.
#include "simt.h"

#include <link.h>

#include <atomic>
#include <thread>

#include "block.h"
#include "sanitizers.h"

namespace {

constexpr size_t kDynamicBytes = 48 << 10;
std::string last_report;

// One OS thread works at a time. Plain atomics, so that the race detector takes no turn for synchronisation.
class Turn {
 public:
  void pass(int to) {
    holder.store(to);
    holder.notify_all();
  }
  void await(int me) {
    for (int now = holder.load(); now != me; now = holder.load()) holder.wait(now);
  }

 private:
  std::atomic<int> holder = -1;
};

constexpr int kHost = -1;

struct Memory {
  const void* inside;  // an address in the module that is looked for
  void* start = nullptr;
  size_t bytes = 0;
};

int find_shared(dl_phdr_info* module, size_t, void* argument) {
  auto& memory = *static_cast<Memory*>(argument);
  const auto address = reinterpret_cast<uintptr_t>(memory.inside);
  bool found = false;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& segment = module->dlpi_phdr[i];
    const uintptr_t start = module->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD && address >= start && address < start + segment.p_memsz) found = true;
    if (segment.p_type == PT_TLS) memory.bytes = segment.p_memsz;
  }
  memory.start = module->dlpi_tls_data;
  return found ? 1 : 0;
}

}  // namespace

// `extern __shared__ T dynamic_shared[]` of a kernel, which has to stand at file scope.
alignas(128) thread_local unsigned char dynamic_shared[kDynamicBytes];

namespace simt {

// Shared memory is the thread-local memory of the module with the kernels: all ones, which is NaN, -1 and no bool.
static void spoil_shared(const void* kernel, size_t dynamic_bytes) {
  running = nullptr;  // the module's first use in this thread allocates the memory
  Memory memory{kernel};
  dl_iterate_phdr(find_shared, &memory);
  std::memset(memory.start, 0xff, memory.bytes);
  running = nullptr;
  forbid(dynamic_shared + dynamic_bytes, kDynamicBytes - dynamic_bytes);
}

void Launch::stop(const std::string& report) {
  if (!stopped) last_report = report;
  stopped = true;
}

Settings& settings() {
  static Settings it;
  return it;
}

bool launch(Size grid, Size block, size_t dynamic_bytes, const void* kernel, std::function<void()> body) {
  Launch launch{std::move(body), grid, block, settings().seed, std::mt19937_64(settings().seed)};
  last_report.clear();
  const unsigned count = grid.x * grid.y * grid.z, size = block.x * block.y * block.z;
  if (count == 0 || size == 0 || size > 1024 || dynamic_bytes > kDynamicBytes) {
    launch.stop("configuration: no such grid, block or shared memory");
    return false;
  }
  Fiber::forget_all();
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i = 0; i < count; ++i) {
    blocks.push_back(std::make_unique<Block>(launch, Size(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y)));
  }
  Turn turn;
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < count; ++i) {
    workers.emplace_back([&, i] {
      turn.await(int(i));
      spoil_shared(kernel, dynamic_bytes);
      while (!launch.stopped && !blocks[i]->ended()) {
        blocks[i]->run();
        turn.pass(kHost);
        turn.await(int(i));
      }
      allow(dynamic_shared, kDynamicBytes);
      turn.pass(kHost);
    });
  }
  std::vector<unsigned> left(count);
  for (unsigned i = 0; i < count; ++i) left[i] = launch.seed == 1 ? i : count - 1 - i;
  while (!left.empty()) {
    const size_t pick = launch.seed < 2 ? left.size() - 1 : launch.random() % left.size();
    const unsigned index = left[pick];
    const bool over = launch.stopped || blocks[index]->ended();
    turn.pass(int(index));
    turn.await(kHost);
    if (over) left.erase(left.begin() + long(pick));
    if (!over && launch.seed < 2) std::rotate(left.begin(), left.end() - 1, left.end());
  }
  for (auto& worker : workers) worker.join();
  return !launch.stopped;
}

Lane& lane() { return *running; }

void fail(const char* what, const char* where) { running->home->fail(*running, std::string(what) + ": " + where); }

void block_barrier(const char* where) { running->home->wait_for_block(*running, where); }

void warp_barrier(uint32_t mask, const char* where) {
  running->source = -1;
  running->home->wait_for_warp(*running, mask, where, true);
}

uint32_t ballot(uint32_t mask, bool predicate, const char* where) {
  running->source = -1;
  running->predicate = predicate;
  return uint32_t(running->home->wait_for_warp(*running, mask, where, false));
}

uint64_t shuffle_bits(const char* where, Shuffle kind, uint32_t mask, uint64_t value, int argument, int width) {
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) fail("shuffle: a width that is no power of two", where);
  const int lane = running->index % kWarp, first = lane / width * width;
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = first + (argument & (width - 1));
      break;
    case Shuffle::kUp:
      source = lane - argument < first ? lane : lane - argument;
      break;
    case Shuffle::kDown:
      source = lane + argument >= first + width ? lane : lane + argument;
      break;
    case Shuffle::kXor:
      source = (lane ^ argument) >= first + width ? lane : lane ^ argument;
      break;
  }
  running->source = source;
  running->value = value;
  return running->home->wait_for_warp(*running, mask, where, false);
}

void fence() {
  running->fenced = true;
  if (running->last_atomic != nullptr) acquire(running->last_atomic);
}

void before_atomic(const void* address) {
  if (running->fenced) release(address);
  running->fenced = false;
}

void after_atomic(const void* address) { running->last_atomic = address; }

}  // namespace simt

void simt_configure(int multiprocessors, uint64_t seed) { simt::settings() = {multiprocessors, seed}; }

const char* simt_report() { return last_report.c_str(); }
