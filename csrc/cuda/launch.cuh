// What the kernels need of CUDA, and the shape of their grids.
//
// The same sources are compiled by nvcc and, for the tests, by a C++ compiler against the host
// execution model in tests/cuda/cuda_sim: only the macros below differ.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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
#define FUSE_ASSUME_COMMON(pointer) FUSE_ASSUME_GLOBAL(pointer)
#define FUSE_STORE_GLOBAL(pointer, value) __stwb(pointer, value)
// Conversions that the hardware has: see packs.cuh.
#define FUSE_FLOAT_OF_HALF(bits) __half2float(__ushort_as_half(bits))
#define FUSE_HALF_OF_FLOAT(value) __half_as_ushort(__float2half_rn(value))
#define FUSE_BFLOAT_OF_FLOAT(value) __bfloat16_as_ushort(__float2bfloat16_rn(value))
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
#define FUSE_CUDA_MOST_LIGHT_BLOCKS 8192
#define FUSE_CUDA_GROUPS 32
#define FUSE_CUDA_FILL 512
#define FUSE_CUDA_LEAST_PAIRS 8
#endif

namespace fuse_ext::cuda {

using Index = std::int64_t;

constexpr int kWarp = 32;
constexpr int kThreads = FUSE_CUDA_THREADS;
constexpr int kWarps = kThreads / kWarp;
// Of a kernel with many sums. None of these is a function of the GPU: sums depend on the length of
// the vectors alone.
constexpr Index kMostBlocks = FUSE_CUDA_MOST_BLOCKS;
// Of a kernel with few sums: so many waves that the last one, which may be nearly empty, is short.
constexpr Index kMostLightBlocks = FUSE_CUDA_MOST_LIGHT_BLOCKS;
// The last block of a group adds up what its group has left, and the last of all what the groups
// have: two short chains of loads instead of a long one.
constexpr int kGroups = FUSE_CUDA_GROUPS;
// A pass over a long history of few parameters is split over its pairs too, up to so many blocks,
// and no finer than so many pairs a block: for each slice the gradient is read again.
constexpr Index kFill = FUSE_CUDA_FILL, kLeastPairs = FUSE_CUDA_LEAST_PAIRS;

// What every GPU gives a block without being asked.
constexpr Index kSharedBytes = 48 * 1024;

// Blocks for `tiles` pieces of work of which each of a block's warps takes one at a time.
inline Index blocks_for(Index tiles, Index warps = kWarps, Index most = kMostBlocks) {
  const Index blocks = (tiles + warps - 1) / warps;
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
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
