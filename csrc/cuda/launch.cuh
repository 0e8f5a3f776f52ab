// What the kernels need of CUDA, and the shape of their grids.
//
// The same sources are compiled by nvcc and, for the tests, by a C++ compiler against the host
// execution model in tests/cuda/cuda_sim: only the macros below differ.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define FUSE_LAUNCH(kernel, blocks, shared_bytes, stream, ...)                         \
  kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared_bytes), \
           static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// The block's dynamic shared memory.
#define FUSE_SHARED(type, name)                      \
  extern __shared__ double shared_memory_of_block[]; \
  type* const name = reinterpret_cast<type*>(shared_memory_of_block)
// Accesses to global memory: see packs.cuh.
#define FUSE_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#define FUSE_STORE_GLOBAL(pointer, value) __stwb(pointer, value)
#else
#include "cuda_sim.h"
#endif

#include "launch.h"

// The tests make blocks and grids small, so that few elements already take every path.
#if !defined(FUSE_CUDA_THREADS)
#define FUSE_CUDA_THREADS 128
#endif
#if !defined(FUSE_CUDA_MOST_BLOCKS)
#define FUSE_CUDA_MOST_BLOCKS 1024
#endif

namespace fuse_ext::cuda {

using Index = std::int64_t;

constexpr int kWarp = 32;
constexpr int kThreads = FUSE_CUDA_THREADS;
constexpr int kWarps = kThreads / kWarp;
// One wave or two on any of today's GPUs. Not a function of the GPU: sums depend on the length of
// the vectors alone.
constexpr Index kMostBlocks = FUSE_CUDA_MOST_BLOCKS;

// What every GPU gives a block without being asked.
constexpr Index kSharedBytes = 48 * 1024;

// Blocks for `tiles` pieces of work of which each of a block's warps takes one at a time.
inline Index blocks_for(Index tiles, Index warps = kWarps) {
  const Index blocks = (tiles + warps - 1) / warps;
  return blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks;
}

// A warp's share of the work: tiles first_tile(), first_tile() + tile_stride(), ...
__device__ __forceinline__ Index first_tile() {
  return static_cast<Index>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}
__device__ __forceinline__ Index tile_stride() { return static_cast<Index>(gridDim.x) * kWarps; }
__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }

// Calls function with a value of the arithmetic type, float or double.
template <class Function>
void with_state_type(DType dtype, Function&& function) {
  if (dtype == DType::f64) {
    function(double{});
  } else {
    function(float{});
  }
}

}  // namespace fuse_ext::cuda
