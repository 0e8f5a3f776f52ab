// Compiled without sanitizers: to ThreadSanitizer the scheduler's own memory does not exist, so
// that it orders nothing.
#include "scheduler.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

// The sanitizers' interfaces; absent in a plain build.
extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t size);
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
#undef WEAK
}

namespace cuda_sim {

Index3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::size_t kStackMargin = 256;  // must never be written
constexpr std::int64_t kMostSharedBytes = 48 * 1024;
constexpr int kMostThreads = 1024;
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber: the switch itself orders nothing

void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}
void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}

// AddressSanitizer's own swapcontext would take all poison off the stack it switches to.
using SwapContext = int (*)(ucontext_t*, const ucontext_t*);
SwapContext swap_context() {
  static const auto function = reinterpret_cast<SwapContext>(
      dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "swapcontext"));
  return function;
}

// Memory full of NaNs, fresh from malloc: the sanitizers watch its ends.
struct Arena {
  explicit Arena(std::size_t size)
      : bytes(static_cast<char*>(std::aligned_alloc(256, (size + 255) / 256 * 256))), size(size) {
    std::memset(bytes, 0xff, (size + 255) / 256 * 256);
  }
  Arena(const Arena&) = delete;
  ~Arena() {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(bytes, size);
    std::free(bytes);
  }
  char* bytes;
  std::size_t size;
};

enum class State { ready, at_barrier, in_warp, ended };

struct Fiber {
  explicit Fiber(int thread)
      : thread(thread), tsan(__tsan_create_fiber ? __tsan_create_fiber(0) : nullptr) {}
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (tsan) __tsan_destroy_fiber(tsan);
  }

  int thread;
  Arena stack{kStackBytes};
  ucontext_t context{};
  void* fake_stack = nullptr;
  void* tsan;
  State state = State::ready;
  Where where{};
  // A shuffle: what the thread gives, and which lane it takes from.
  unsigned mask = 0;
  std::uint64_t value = 0;
  int source_lane = 0;
  unsigned barriers = 0, warp_syncs = 0;  // passed so far
  bool fenced = false;                    // since the last barrier
  std::vector<void*> atomics;             // touched since the last fence
};

struct Block {
  Block(unsigned index, int threads, std::int64_t shared_bytes)
      : index(index),
        shared(static_cast<std::size_t>(shared_bytes)),
        warp_tokens(static_cast<std::size_t>(2 * ((threads + kWarp - 1) / kWarp))) {
    for (int i = 0; i < threads; ++i) fibers.push_back(std::make_unique<Fiber>(i));
  }
  unsigned index;
  Arena shared;
  std::vector<std::unique_ptr<Fiber>> fibers;
  // Two of each are enough: nobody reaches the barrier after next before all have left this one.
  char barrier_tokens[2];
  std::vector<char> warp_tokens;
};

Order schedule_order = Order::forward;
unsigned schedule_seed = 0;
std::int64_t launches = 0;
std::int64_t moved = 0;

const std::function<void()>* kernel_of_launch = nullptr;
Block* block = nullptr;
Fiber* fiber = nullptr;
ucontext_t host_context;
void* host_tsan = nullptr;
const void* host_stack = nullptr;
std::size_t host_stack_size = 0;
char end_token;

void switch_to_host(bool for_good) {
  Fiber* const self = fiber;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, host_stack,
                                   host_stack_size);
  }
  if (host_tsan) __tsan_switch_to_fiber(host_tsan, kNoSync);
  swap_context()(&self->context, &host_context);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self->fake_stack, &host_stack, &host_stack_size);
  }
}

void run_fiber() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
  }
  (*kernel_of_launch)();
  release(&end_token);
  fiber->state = State::ended;
  switch_to_host(true);
}

void resume(Fiber& next) {
  fiber = &next;
  thread_index.x = static_cast<unsigned>(next.thread);
  void* fake_stack = nullptr;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&fake_stack, next.stack.bytes, kStackBytes);
  }
  if (next.tsan) __tsan_switch_to_fiber(next.tsan, kNoSync);
  swap_context()(&host_context, &next.context);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }
  fiber = nullptr;
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string describe(const Fiber& f) {
  const std::string thread = "thread " + std::to_string(f.thread);
  if (f.state == State::ended) return thread + " has ended";
  const std::string path = f.where.file_name();
  return thread +
         (f.state == State::at_barrier ? " waits at the barrier " : " waits in the warp ") +
         path.substr(path.rfind('/') + 1) + ":" + std::to_string(f.where.line());
}

[[noreturn]] void do_not_meet(const Fiber& a, const Fiber& b) {
  throw std::runtime_error("block " + std::to_string(block->index) + ": " + describe(a) + ", but " +
                           describe(b));
}

// Lets the lanes of a shuffle go on where all of them have come. Whether any could.
bool release_warp(int first, int last) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    Fiber& f = *block->fibers[static_cast<std::size_t>(i)];
    if (f.state != State::in_warp) continue;
    std::vector<Fiber*> members;
    bool complete = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(f.mask >> lane & 1u)) continue;
      if (first + lane >= last)
        throw std::runtime_error("a shuffle names a lane that is not there");
      Fiber& other = *block->fibers[static_cast<std::size_t>(first + lane)];
      complete = complete && other.state == State::in_warp && other.mask == f.mask &&
                 same_place(other.where, f.where);
      members.push_back(&other);
    }
    if (!complete) continue;
    std::vector<std::uint64_t> values;
    for (const Fiber* member : members) {
      if (!(f.mask >> member->source_lane & 1u)) {
        throw std::runtime_error("a shuffle reads a lane outside of its mask");
      }
      values.push_back(block->fibers[static_cast<std::size_t>(first + member->source_lane)]->value);
    }
    for (std::size_t k = 0; k < members.size(); ++k) {
      members[k]->value = values[k];
      members[k]->state = State::ready;
    }
    any = true;
  }
  return any;
}

// Lets all threads pass the barrier where all have come. Whether they could.
bool release_barrier() {
  const Fiber& front = *block->fibers.front();
  for (const auto& f : block->fibers) {
    if (f->state != State::at_barrier || !same_place(f->where, front.where)) return false;
  }
  for (const auto& f : block->fibers) f->state = State::ready;
  return true;
}

std::vector<int> in_order(int count, std::mt19937& random) {
  std::vector<int> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (schedule_order == Order::reverse) std::reverse(order.begin(), order.end());
  if (schedule_order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

void run_block(std::mt19937& random) {
  const int threads = static_cast<int>(block->fibers.size());
  const int warps = (threads + kWarp - 1) / kWarp;
  const auto all_ended = [] {
    return std::all_of(block->fibers.begin(), block->fibers.end(),
                       [](const auto& f) { return f->state == State::ended; });
  };
  while (!all_ended()) {
    for (const int warp : in_order(warps, random)) {
      const int first = warp * kWarp, last = std::min(threads, first + kWarp);
      do {
        for (const int lane : in_order(last - first, random)) {
          Fiber& next = *block->fibers[static_cast<std::size_t>(first + lane)];
          if (next.state == State::ready) resume(next);
        }
      } while (release_warp(first, last));
    }
    if (release_barrier() || all_ended()) continue;
    // Whoever waits is stuck; name the odd one out.
    const auto stuck = std::find_if(block->fibers.begin(), block->fibers.end(),
                                    [](const auto& f) { return f->state != State::ended; });
    const auto other = std::find_if(block->fibers.begin(), block->fibers.end(), [&](const auto& f) {
      return f->state != (*stuck)->state || !same_place(f->where, (*stuck)->where);
    });
    do_not_meet(**stuck, other == block->fibers.end() ? **stuck : **other);
  }
}

void start_block(Block& here) {
  block = &here;
  block_index.x = here.index;
  for (const auto& f : here.fibers) {
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.bytes;
    f->context.uc_stack.ss_size = kStackBytes;
    makecontext(&f->context, run_fiber, 0);
  }
}

void check_stacks(const Block& here) {
  for (const auto& f : here.fibers) {
    const char* const margin = f->stack.bytes;
    if (std::any_of(margin, margin + kStackMargin, [](char c) { return c != '\xff'; })) {
      throw std::runtime_error("a simulated thread has overrun its stack");
    }
  }
}

void wait(State state, Where where) {
  fiber->state = state;
  fiber->where = where;
  switch_to_host(false);
}

}  // namespace

void set_schedule(Order order, unsigned seed) {
  schedule_order = order;
  schedule_seed = seed;
}

std::int64_t launch_count() { return launches; }

void move_bytes(std::int64_t bytes) { moved += bytes; }
std::int64_t bytes_moved() { return moved; }

void launch(std::int64_t blocks, int threads, std::int64_t shared_bytes,
            const std::function<void()>& kernel) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > kMostThreads ||
      shared_bytes < 0 || shared_bytes > kMostSharedBytes) {
    throw std::runtime_error("CUDA would refuse to launch " + std::to_string(blocks) +
                             " blocks of " + std::to_string(threads) + " threads with " +
                             std::to_string(shared_bytes) + " bytes of shared memory");
  }
  ++launches;
  kernel_of_launch = &kernel;
  grid_size.x = static_cast<unsigned>(blocks);
  block_size.x = static_cast<unsigned>(threads);
  host_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  std::mt19937 random(schedule_seed);
  // All blocks live until the grid has ended: freeing one would order it before the next.
  std::vector<std::unique_ptr<Block>> grid(static_cast<std::size_t>(blocks));
  try {
    for (const int index : in_order(static_cast<int>(blocks), random)) {
      auto& here = grid[static_cast<std::size_t>(index)];
      here = std::make_unique<Block>(static_cast<unsigned>(index), threads, shared_bytes);
      start_block(*here);
      run_block(random);
      check_stacks(*here);
    }
  } catch (...) {
    // Threads that never end still own their stacks.
    for (auto& here : grid) static_cast<void>(here.release());
    throw;
  }
  acquire(&end_token);
}

void* shared_memory() { return block->shared.bytes; }

int lane() { return fiber->thread % kWarp; }

void sync_threads(Where where) {
  char* const token = &block->barrier_tokens[fiber->barriers++ % 2];
  fiber->fenced = false;
  fiber->atomics.clear();
  release(token);
  wait(State::at_barrier, where);
  acquire(token);
}

std::uint64_t exchange(unsigned mask, std::uint64_t value, int source_lane, bool orders,
                       Where where) {
  fiber->mask = mask;
  fiber->value = value;
  fiber->source_lane = source_lane;
  char* const token = &block->warp_tokens[static_cast<std::size_t>(2 * (fiber->thread / kWarp)) +
                                          (orders ? fiber->warp_syncs++ % 2 : 0)];
  if (orders) release(token);
  wait(State::in_warp, where);
  if (orders) acquire(token);
  return fiber->value;
}

void fence() {
  fiber->fenced = true;
  for (void* address : fiber->atomics) acquire(address);
  fiber->atomics.clear();
}

namespace {
unsigned atomically(unsigned* address, unsigned value) {
  if (fiber->fenced) release(address);
  fiber->atomics.push_back(address);
  const unsigned before = *address;
  *address = value;
  return before;
}
}  // namespace

unsigned atomic_add(unsigned* address, unsigned value) {
  return atomically(address, *address + value);
}
unsigned atomic_exchange(unsigned* address, unsigned value) { return atomically(address, value); }

}  // namespace cuda_sim
