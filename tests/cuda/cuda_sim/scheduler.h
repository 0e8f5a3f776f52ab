// A host execution model of CUDA: runs a kernel's threads as fibers, one block after the other.
//
// A warp runs as far ahead as it can before the next one starts, and a thread as far as it can
// before the next of its warp; in which order is the schedule. Threads meet at barriers, shuffles
// and the end of their block only. It is an error if they do not meet: if threads of a block wait
// at different barriers, or if a lane named in a shuffle's mask does not take part in it.
//
// What it does not model: blocks that run at the same time, caches, and memory that other threads
// see late. Under ThreadSanitizer that does not matter: each CUDA thread is a thread to it, ordered
// with others only by what orders CUDA threads (see `fence` below), so that a race is found
// whatever the schedule was.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>

namespace cuda_sim {

using Where = std::source_location;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
extern Index3 thread_index, block_index, block_size, grid_size;

enum class Order : int { forward, reverse, shuffled };
void set_schedule(Order order, unsigned seed);

// Kernels launched so far.
std::int64_t launch_count();

// Counts an access to global memory, and says how many bytes were read and written so far. Only
// what kernels load and store by name (packs.cuh) is counted, not what they read of tables and
// scalars. Not to be seen by a sanitizer, to which all threads share the count.
void move_bytes(std::int64_t bytes);
std::int64_t bytes_moved();

// Runs the kernel to its end. Shared memory and stacks are new to every block and full of NaNs.
// Throws std::runtime_error for what CUDA would refuse, and where threads do not meet.
void launch(std::int64_t blocks, int threads, std::int64_t shared_bytes,
            const std::function<void()>& kernel);

// What follows is for kernels.
void* shared_memory();
void sync_threads(Where where);

// Waits for the lanes of the mask and returns the value of one of them. Orders no memory accesses,
// unless `orders` is set, as by __syncwarp.
std::uint64_t exchange(unsigned mask, std::uint64_t value, int source_lane, bool orders,
                       Where where);
int lane();

// Two threads are ordered by fences around atomics on one address: what the one did before a fence
// that is followed by its atomic has happened, for what the other does after a fence that follows
// its later atomic. Between fence and atomic there must be no barrier.
void fence();
unsigned atomic_add(unsigned* address, unsigned value);
unsigned atomic_exchange(unsigned* address, unsigned value);

}  // namespace cuda_sim
