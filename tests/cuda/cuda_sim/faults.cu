// A small kernel with everything that can go wrong, and one fault at a time planted in it: what
// the tests of the execution model itself run. Usage: faults NAME
//
// Exits with 0 if the kernel's result is right in all three schedules; the sanitizers speak for
// themselves.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "cuda_sim.h"

namespace {

constexpr int kThreads = 64, kBlocks = 3, kWarp = 32;

enum class Fault {
  none,
  bound_off_by_one,
  tail_read_as_vector,
  misaligned_vector,
  shared_overrun,
  missing_barrier,
  missing_syncwarp,
  missing_release,
  missing_acquire,
  counter_not_reset,
  divergent_barrier,
  thread_leaves_early,
  missing_lane,
  uninitialised_shared,
};

// The sum of x[0, n): vectors and a tail, lanes by shuffles and through shared memory, warps in
// shared memory, blocks by the last one of them.
template <Fault fault>
__global__ void sum_kernel(const float* x, int n, double* partials, unsigned* counter,
                           double* out) {
  FUSE_SHARED(double, shared);  // kThreads + 1 doubles
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int stride = static_cast<int>(gridDim.x) * kThreads;
  double sum = 0;
  for (int i = static_cast<int>(blockIdx.x) * kThreads + thread; 4 * i < n; i += stride) {
    const float* const pack = x + 4 * i + (fault == Fault::misaligned_vector ? 1 : 0);
    if (4 * i + 4 <= n || fault == Fault::tail_read_as_vector) {
      const uint4 bits = *reinterpret_cast<const uint4*>(pack);
      float values[4];
      std::memcpy(values, &bits, sizeof values);
      for (const float value : values) sum += value;
    } else {
      const int end = n + (fault == Fault::bound_off_by_one ? 1 : 0);
      for (int k = 4 * i; k < end; ++k) sum += x[k];
    }
  }
  if (fault == Fault::thread_leaves_early && thread == 5) return;
  // Half of the lanes hand their sums over through shared memory, the rest is shuffled.
  shared[thread] = sum;
  if (fault != Fault::missing_syncwarp) __syncwarp();
  if (lane < 16) sum += shared[thread + 16];
  if (fault != Fault::missing_lane || lane != 3) {
    for (int distance = 8; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
  }
  if (fault == Fault::divergent_barrier && thread < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (lane == 0) shared[thread / kWarp] = sum;
  if (fault == Fault::shared_overrun) shared[kThreads + 1 + thread] = 0;
  if (fault != Fault::missing_barrier) __syncthreads();
  if (thread == 0) {
    const double first = fault == Fault::uninitialised_shared ? shared[kThreads] : shared[0];
    partials[blockIdx.x] = first + shared[1];
  }
  __syncthreads();
  if (thread == 0) {
    if (fault != Fault::missing_release) __threadfence();
    const bool last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (fault != Fault::missing_acquire) __threadfence();
    if (last && fault != Fault::counter_not_reset) atomicExch(counter, 0u);
    shared[kThreads] = last ? 1 : 0;
  }
  __syncthreads();
  if (shared[kThreads] == 1 && thread == 1) {
    double total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += partials[block];
    *out = total;
  }
}

template <Fault fault>
bool run() {
  const int n = 4 * 300 + 2;  // whole packs for every block, and a tail
  // Just as long as needed, so that a sanitizer sees where it ends.
  std::vector<float> x(static_cast<std::size_t>(n + (fault == Fault::misaligned_vector ? 6 : 0)));
  bool right = true;
  for (const auto order :
       {cuda_sim::Order::forward, cuda_sim::Order::reverse, cuda_sim::Order::shuffled}) {
    cuda_sim::set_schedule(order, 7);
    double expected = 0;
    for (int i = 0; i < n; ++i) expected += x[static_cast<std::size_t>(i)] = float(i % 7);
    std::vector<double> partials(kBlocks, std::numeric_limits<double>::quiet_NaN());
    unsigned counter = 0;
    double out = std::numeric_limits<double>::quiet_NaN();
    const float* const in = x.data();
    double* const parts = partials.data();
    unsigned* const count = &counter;
    double* const result = &out;
    FUSE_LAUNCH((sum_kernel<fault>), kBlocks, sizeof(double) * (kThreads + 1), nullptr, in, n,
                parts, count, result);
    std::printf("sum %g, expected %g, counter %u\n", out, expected, counter);
    right = right && out == expected && counter == 0;
  }
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, bool (*)()> programs = {
      {"none", run<Fault::none>},
      {"bound_off_by_one", run<Fault::bound_off_by_one>},
      {"tail_read_as_vector", run<Fault::tail_read_as_vector>},
      {"misaligned_vector", run<Fault::misaligned_vector>},
      {"shared_overrun", run<Fault::shared_overrun>},
      {"missing_barrier", run<Fault::missing_barrier>},
      {"missing_syncwarp", run<Fault::missing_syncwarp>},
      {"missing_release", run<Fault::missing_release>},
      {"missing_acquire", run<Fault::missing_acquire>},
      {"counter_not_reset", run<Fault::counter_not_reset>},
      {"divergent_barrier", run<Fault::divergent_barrier>},
      {"thread_leaves_early", run<Fault::thread_leaves_early>},
      {"missing_lane", run<Fault::missing_lane>},
      {"uninitialised_shared", run<Fault::uninitialised_shared>},
  };
  const auto program = programs.find(argc == 2 ? argv[1] : "");
  if (program == programs.end()) return 2;
  try {
    return program->second() ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 3;
  }
}
