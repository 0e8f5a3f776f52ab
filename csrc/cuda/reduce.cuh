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

// Counts the blocks that have come so far, of `expected`; the last one gets true, and sees what the
// others have written to memory. To be called by every thread of a block. `shared` is overwritten.
__device__ __forceinline__ bool is_last_to_come(unsigned* counter, unsigned expected,
                                                double* shared) {
  __syncthreads();  // what the block has to leave is written, its shared memory is free
  if (threadIdx.x == 0) {
    __threadfence();  // release it ...
    const bool last = atomicAdd(counter, 1u) == expected - 1;
    __threadfence();  // ... and acquire the other blocks'
    if (last) atomicExch(counter, 0u);
    shared[0] = last ? 1.0 : 0.0;
  }
  __syncthreads();
  const bool last = shared[0] != 0.0;
  __syncthreads();
  return last;
}

// The blocks that add up together: those of the grid, or of one slice of it.
struct Team {
  unsigned rank, size;
  double* partials;    // (size + kGroups) rows of columns
  unsigned* counters;  // kGroups + 1 zeros
};

__device__ __forceinline__ Team whole_grid(Workspace workspace) {
  return {blockIdx.x, gridDim.x, workspace.partials, workspace.counters};
}

// The sums of a team: `width` columns, of which the last `maxima` are maxima. Shared memory holds
// one row of columns for each of the `rows` warps that take part, and later one value per thread.
class GridSums {
 public:
  __device__ __forceinline__ GridSums(double* shared, int width, int maxima, const Team& team,
                                      int rows = kWarps)
      : shared_(shared), rows_(rows), width_(width), sums_(width - maxima), team_(team) {
    for (int i = static_cast<int>(threadIdx.x); i < rows_ * width_; i += kThreads) shared_[i] = 0;
    __syncthreads();
  }

  // The calling warp's own cell of a column: only one of its lanes may touch it.
  __device__ __forceinline__ double& cell(int column) const {
    return shared_[static_cast<int>(threadIdx.x) / kWarp * width_ + column];
  }

  // Called once by every thread of the team. The last block calls write(column, total), after all
  // others are done, and gets true. The last block of a group of neighbours adds up these, and the
  // last of all the groups.
  template <class Write>
  __device__ __forceinline__ bool finish(Write&& write) const {
    __syncthreads();
    double* const mine = row(team_.rank);
    for (int column = static_cast<int>(threadIdx.x); column < width_; column += kThreads) {
      double total = 0;
      for (int warp = 0; warp < rows_; ++warp) {
        total = join(column, total, shared_[warp * width_ + column]);
      }
      mine[column] = total;
    }
    unsigned begin = 0, end = team_.size;
    if (team_.size > kGroups) {
      const unsigned length = (team_.size + kGroups - 1) / kGroups, group = team_.rank / length;
      const unsigned first = group * length, groups = (team_.size + length - 1) / length;
      const unsigned stop = first + length < team_.size ? first + length : team_.size;
      if (!is_last_to_come(team_.counters + 1 + group, stop - first, shared_)) return false;
      double* const group_row = row(team_.size + group);
      add_rows(first, stop, [&](int column, double total) { group_row[column] = total; });
      begin = team_.size, end = team_.size + groups;
    }
    if (!is_last_to_come(team_.counters, end - begin, shared_)) return false;
    add_rows(begin, end, write);
    return true;
  }

 private:
  __device__ __forceinline__ double* row(unsigned which) const {
    return team_.partials + static_cast<Index>(which) * width_;
  }
  __device__ __forceinline__ double join(int column, double a, double b) const {
    return column < sums_ ? a + b : larger(a, b);
  }

  template <class Write>
  __device__ __forceinline__ void add_rows(unsigned begin, unsigned end, Write&& write) const {
    for (int from = 0; from < width_; from += kThreads) add_columns(from, begin, end, write);
  }

  // Up to kThreads columns; where there are fewer, several threads share the rows of each.
  template <class Write>
  __device__ __forceinline__ void add_columns(int from, unsigned begin, unsigned end,
                                              Write& write) const {
    const int columns = width_ - from < kThreads ? width_ - from : kThreads;
    const int parts = kThreads / columns, thread = static_cast<int>(threadIdx.x);
    const int part = thread / columns, column = from + thread % columns;
    if (part < parts) {
      double total = 0;
#pragma unroll 8
      for (unsigned i = begin + static_cast<unsigned>(part); i < end;
           i += static_cast<unsigned>(parts)) {
        total = join(column, total, row(i)[column]);
      }
      shared_[thread] = total;
    }
    // By halves: few steps where many threads share a column.
    for (int left = parts; left > 1; left = (left + 1) / 2) {
      __syncthreads();
      const int half = (left + 1) / 2;
      if (part < left - half) {
        shared_[thread] = join(column, shared_[thread], shared_[thread + half * columns]);
      }
    }
    __syncthreads();
    if (thread < columns) write(column, shared_[thread]);
    __syncthreads();
  }

  double* shared_;
  int rows_, width_, sums_;
  Team team_;
};

// Shared memory of a kernel with GridSums of this size.
inline Index sums_bytes(Index width, Index rows = kWarps) {
  const Index cells = rows * width;
  return (cells > kThreads ? cells : kThreads) * static_cast<Index>(sizeof(double));
}

}  // namespace fuse_ext::cuda
