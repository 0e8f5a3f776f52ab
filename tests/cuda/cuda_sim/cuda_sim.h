// CUDA's vocabulary for a C++ compiler: what csrc/cuda/*.cu need of it, on top of scheduler.h.
// csrc/cuda/launch.cuh includes this where nvcc's headers are not to be had.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numeric.h"
#include "scheduler.h"

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

#define FUSE_LAUNCH(kernel, blocks, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                  \
   cuda_sim::launch(blocks, kThreads, shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define FUSE_SHARED(type, name) type* const name = static_cast<type*>(cuda_sim::shared_memory())
#define FUSE_ASSUME_GLOBAL(pointer) cuda_sim::move_bytes(sizeof *(pointer))
#define FUSE_ASSUME_COMMON(pointer) static_cast<void>(pointer)
#define FUSE_STORE_GLOBAL(pointer, value) \
  (cuda_sim::move_bytes(sizeof *(pointer)), static_cast<void>(*(pointer) = value))

// What the hardware converts: as the CPU's kernels do.
inline float sim_float_of_half(std::uint16_t bits) {
  return fuse_ext::load<float>(fuse_ext::Float16{bits});
}
inline std::uint16_t sim_half_of_float(float value) {
  fuse_ext::Float16 stored;
  fuse_ext::store(&stored, value);
  return stored.bits;
}
inline std::uint16_t sim_bfloat_of_float(float value) {
  fuse_ext::BFloat16 stored;
  fuse_ext::store(&stored, value);
  return stored.bits;
}
#define FUSE_FLOAT_OF_HALF(bits) sim_float_of_half(bits)
#define FUSE_HALF_OF_FLOAT(value) sim_half_of_float(value)
#define FUSE_BFLOAT_OF_FLOAT(value) sim_bfloat_of_float(value)

// Four of the eight bytes of two words, chosen by the selector's hexadecimal digits.
inline std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t which = selector >> (4 * i) & 7u;
    word |= static_cast<std::uint32_t>(bytes >> (8 * which) & 0xffu) << (8 * i);
  }
  return word;
}

inline const auto& threadIdx = cuda_sim::thread_index;
inline const auto& blockIdx = cuda_sim::block_index;
inline const auto& blockDim = cuda_sim::block_size;
inline const auto& gridDim = cuda_sim::grid_size;

struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) { return {x, y}; }

inline void __syncthreads(cuda_sim::Where where = cuda_sim::Where::current()) {
  cuda_sim::sync_threads(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_sim::Where where = cuda_sim::Where::current()) {
  cuda_sim::exchange(mask, 0, cuda_sim::lane(), true, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from,
              cuda_sim::Where where = cuda_sim::Where::current()) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_sim::exchange(mask, bits, from, false, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance,
                  cuda_sim::Where where = cuda_sim::Where::current()) {
  return __shfl_sync(mask, value, cuda_sim::lane() ^ distance, where);
}

inline void __threadfence() { cuda_sim::fence(); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return cuda_sim::atomic_add(address, value);
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return cuda_sim::atomic_exchange(address, value);
}
