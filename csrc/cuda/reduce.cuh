// Sums that are the same in every run: within a warp by shuffles, within a block in shared memory,
// over the grid by whichever block ends last, always in one order. No float atomics.
#pragma once

#include "launch.cuh"

namespace fuse_ext::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Not NaN, unless that is all there is: a NaN shows in the sums.
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return b > a ? b : a;
}

template <class T>
__device__ __forceinline__ T magnitude_of(T value) {
  return value < T(0) ? -value : value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Sums of four values at once: lane l returns the warp's sum of the (l mod 4)-th.
template <class T>
__device__ __forceinline__ T warp_sum_of_four(T a, T b, T c, T d) {
  const int lane = lane_of_thread();
  const bool odd = lane & 1, upper = lane & 2;
  const T first = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 1);
  const T second = (odd ? d : c) + __shfl_xor_sync(kAllLanes, odd ? c : d, 1);
  T sum = (upper ? second : first) + __shfl_xor_sync(kAllLanes, upper ? first : second, 2);
#pragma unroll
  for (int distance = 4; distance < kWarp; distance *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

// The sums of a grid: `width` columns, of which the last `maxima` are maxima. Shared memory holds
// one row of columns for each of the `rows` warps that take part, and later one value per thread.
class GridSums {
 public:
  __device__ __forceinline__ GridSums(double* shared, int width, int maxima, Workspace workspace,
                                      int rows = kWarps)
      : shared_(shared), rows_(rows), width_(width), sums_(width - maxima), workspace_(workspace) {
    for (int i = static_cast<int>(threadIdx.x); i < rows_ * width_; i += kThreads) shared_[i] = 0;
    __syncthreads();
  }

  // The calling warp's own cell of a column: only one of its lanes may touch it.
  __device__ __forceinline__ double& cell(int column) const {
    return shared_[static_cast<int>(threadIdx.x) / kWarp * width_ + column];
  }

  // Called once by every thread of the grid. The last block calls write(column, total), after all
  // others are done, and gets true.
  template <class Write>
  __device__ __forceinline__ bool finish(Write&& write) const {
    __syncthreads();
    double* const mine = workspace_.partials + static_cast<Index>(blockIdx.x) * width_;
    for (int column = static_cast<int>(threadIdx.x); column < width_; column += kThreads) {
      double total = 0;
      for (int warp = 0; warp < rows_; ++warp) {
        total = join(column, total, shared_[warp * width_ + column]);
      }
      mine[column] = total;
    }
    if (!is_last_block()) return false;
    for (int from = 0; from < width_; from += kThreads) add_columns(from, write);
    return true;
  }

 private:
  __device__ __forceinline__ double join(int column, double a, double b) const {
    return column < sums_ ? a + b : larger(a, b);
  }

  __device__ __forceinline__ bool is_last_block() const {
    __syncthreads();  // the block's partial sums are written, its shared memory is free
    if (threadIdx.x == 0) {
      __threadfence();  // release them ...
      const bool last = atomicAdd(workspace_.counter, 1u) == gridDim.x - 1;
      __threadfence();  // ... and acquire the other blocks'
      if (last) atomicExch(workspace_.counter, 0u);
      shared_[0] = last ? 1.0 : 0.0;
    }
    __syncthreads();
    const bool last = shared_[0] != 0.0;
    __syncthreads();
    return last;
  }

  // Up to kThreads columns; where there are fewer, several threads share the blocks of each.
  template <class Write>
  __device__ __forceinline__ void add_columns(int from, Write& write) const {
    const int columns = width_ - from < kThreads ? width_ - from : kThreads;
    const int parts = kThreads / columns, thread = static_cast<int>(threadIdx.x);
    const int part = thread / columns, column = from + thread % columns;
    if (part < parts) {
      double total = 0;
#pragma unroll 4
      for (Index block = part; block < static_cast<Index>(gridDim.x); block += parts) {
        total = join(column, total, workspace_.partials[block * width_ + column]);
      }
      shared_[thread] = total;
    }
    __syncthreads();
    if (thread < columns) {
      double total = 0;
      for (int i = 0; i < parts; ++i) total = join(column, total, shared_[i * columns + thread]);
      write(column, total);
    }
    __syncthreads();
  }

  double* shared_;
  int rows_, width_, sums_;
  Workspace workspace_;
};

// Shared memory of a kernel with GridSums of this size.
inline Index sums_bytes(Index width, Index rows = kWarps) {
  const Index cells = rows * width;
  return (cells > kThreads ? cells : kThreads) * static_cast<Index>(sizeof(double));
}

}  // namespace fuse_ext::cuda
