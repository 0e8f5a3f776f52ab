// What the kernels of dense.cu share: the iteration as they see it, what they tell each other, and
// how the matrix lies in a warp's registers.
#pragma once

#include "packs.cuh"
#include "reduce.cuh"

namespace fuse_ext::cuda {

// A block works on a square of so many tiles a side at a time.
constexpr int kSide = 8;
constexpr int kSquare = kSide * static_cast<int>(kTile);

__host__ __device__ __forceinline__ Index square_rows(Index numel) {
  return (tile_rows(numel) + kSide - 1) / kSide;
}

// Row and column of a square; they are numbered as tiles are.
struct Square {
  Index row, column;

  __device__ __forceinline__ explicit Square(Index number)
      : row(static_cast<Index>((sqrt(8.0 * static_cast<double>(number) + 1.0) - 1.0) / 2.0)) {
    while (tiles_before(row) > number) --row;
    while (tiles_before(row + 1) <= number) ++row;
    column = number - tiles_before(row);
  }
  // Tiles in the square's i-th row of tiles.
  __device__ __forceinline__ int tiles(int i) const { return row == column ? i + 1 : kSide; }
  __device__ __forceinline__ Index tile_row(int i) const { return row * kSide + i; }
  __device__ __forceinline__ Index tile_column(int j) const { return column * kSide + j; }
};

// What the kernels of one iteration tell each other.
struct Plan {
  double ss, sy, yy, sg;            // of the pair, and s.g
  double y_h_y, wg, yg;             // w.y, w.g, y.g
  double gamma;                     // s.y / y.y
  double tau, of_s, of_w;           // H+ g = H g / tau + of_s s + of_w w
  double scale;                     // of M and its terms, when M takes them in
  double coefs[2][2 * kMostTerms];  // of the terms' vectors in H g and H g_prev, over the scale
  int fits;                         // the pair passes the curvature test
  int begins;                       // H begins anew, with gamma I
  int taken_in;                     // terms that M takes in; 0: none
  int term;                         // place of the new term; -1: none
};
constexpr Index kPlanSize = (static_cast<Index>(sizeof(Plan)) + 7) / 8;

template <class T>
struct Iteration {
  const T *grad, *lr_scale;  // lr_scale may be null
  T *grad_prev, *direction;
  DensePair pair;
  Formula formula;
  double *matrix, *vectors, *numbers, *head;
  Plan* plan;
  // [2, square_rows, length]: what each column of squares gives of M g, and of M g_prev.
  double* partial;
  Index numel, length, stride;
  int most_terms;
  bool aligned;  // two neighbours of a tile or of a term's vectors may be moved together
  Workspace workspace;

  __device__ __forceinline__ double g(Index i) const { return element(grad, i); }
  __device__ __forceinline__ double g_prev(Index i) const { return element(grad_prev, i); }
  __device__ __forceinline__ double s(Index i) const { return pair.step * element(direction, i); }
  __device__ __forceinline__ double* row(Index i) const { return vectors + i * stride; }
  __device__ __forceinline__ double* known_product() const { return row(2 * most_terms); }
  __device__ __forceinline__ double* a_of(Index term) const {
    return numbers + kMatrixHeader + term * kTermSize;
  }
  __device__ __forceinline__ bool is_identity() const { return numbers[kPairs] == 0.0; }
  // Whether H g_prev would have to be computed for a pair.
  __device__ __forceinline__ bool is_unknown() const {
    return pair.offered && !is_identity() && numbers[kKnown] == 0.0;
  }

  // A vector's element, or the zero that stands behind its end.
  __device__ __forceinline__ double element(const T* vector, Index i) const {
    return i < numel ? static_cast<double>(load_global<T>(vector + i)) : 0.0;
  }
  // The same where the lanes of a column, and other warps, ask for it too.
  __device__ __forceinline__ double common_element(const T* vector, Index i) const {
    return i < numel ? static_cast<double>(load_common<T>(vector + i)) : 0.0;
  }
};

// The terms that are held apart. Whatever the scalars say there are no more than fit: what a
// damaged checkpoint holds must not become an address. The product is NaN then, which shows.
struct Held {
  int terms;
  double scale;

  __device__ __forceinline__ Held(const double* numbers, int most_terms)
      : terms(0), scale(numbers[kScale]) {
    const double held = numbers[kTerms];
    if (held >= 0.0 && held < most_terms) {
      terms = static_cast<int>(held);
    } else {
      scale = nan("");
    }
  }
};

// How a tile lies in a warp's registers: each thread has two neighbours of a row.
__device__ __forceinline__ int row_of_lane() { return lane_of_thread() / 4; }
__device__ __forceinline__ int column_of_lane() { return lane_of_thread() % 4 * 2; }

__device__ __forceinline__ void load_two(const double* from, bool aligned, double (&out)[2]) {
  if (aligned) {
    const double2 both = load_global<double2>(from);
    out[0] = both.x, out[1] = both.y;
  } else {
    out[0] = load_global<double>(from), out[1] = load_global<double>(from + 1);
  }
}
// The same of a vector, of which all rows of a tile ask for the same.
__device__ __forceinline__ void load_common_two(const double* from, bool aligned,
                                                double (&out)[2]) {
  if (aligned) {
    const double2 both = load_common<double2>(from);
    out[0] = both.x, out[1] = both.y;
  } else {
    out[0] = load_common<double>(from), out[1] = load_common<double>(from + 1);
  }
}
__device__ __forceinline__ void store_two(double* to, bool aligned, const double (&values)[2]) {
  if (aligned) {
    store_global(to, make_double2(values[0], values[1]));
  } else {
    store_global(to, values[0]), store_global(to + 1, values[1]);
  }
}

// The block's sums of four values, in sums[0] to sums[3]; called once.
__device__ __forceinline__ const double* block_sum_of_four(double* shared, double a, double b,
                                                           double c, double d) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread();
  const double sum = warp_sum_of_four(a, b, c, d);
  if (lane < 4) shared[thread / kWarp * 4 + lane] = sum;
  __syncthreads();
  double* const sums = shared + kWarps * 4;
  if (thread < 4) {
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp * 4 + thread];
    sums[thread] = total;
  }
  __syncthreads();
  return sums;
}

}  // namespace fuse_ext::cuda
