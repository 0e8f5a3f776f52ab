// One iteration with a dense inverse Hessian (broyden.h), in four kernels:
//
//   dense_product  reads the tiles once, for M g; takes the dots of g and the terms, of the pair
//   dense_join     adds up H g and w = H y; its last block runs the formula
//   dense_finish   H+ g, the direction, the previous gradient and the new term's vectors
//   dense_take_in  the matrix takes its terms in, or becomes the identity; mostly ends at once
//
// What only the device knows (whether the pair fits, whether H begins anew, whether there is room
// for one more term) the kernels read in the matrix's scalars and hand on in a Plan; the scalars
// change when all blocks of dense_join have read them, and not again. For d parameters the tiles
// are 4 d^2 bytes, and what dense_product leaves for dense_join is d^2 / 8, written and read once.
#include "dense.cuh"

namespace fuse_ext::cuda {
namespace {

// What a square and its mirror image give of M x, `x` being a function of the place. Shared memory
// holds the square's rows, and its columns once for every warp.
template <class T, class Vector>
__device__ __forceinline__ void square_product(const Iteration<T>& a, const Square& square,
                                               Vector&& x, double* partial, double* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_of_thread();
  const int r = row_of_lane(), c = column_of_lane();
  const Index rows = tile_rows(a.numel);
  const bool diagonal = square.row == square.column;
  double* const columns = shared + kSquare;
  double other_x[kSide][2], mirrored[kSide][2];
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      other_x[j][k] = x(square.tile_column(j) * kTile + c + k);
      mirrored[j][k] = 0;
    }
  }
#pragma unroll 1
  for (int i = warp; i < kSide && square.tile_row(i) < rows; i += kWarps) {
    const int tiles = square.tiles(i);
    const double* const from =
        a.matrix + (tiles_before(square.tile_row(i)) + square.tile_column(0)) * kTileSize +
        2 * lane;
    double values[kSide][2];
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      values[j][0] = values[j][1] = 0;
      if (j < tiles) load_two(from + j * kTileSize, a.aligned, values[j]);
    }
    const double own_x = x(square.tile_row(i) * kTile + r);
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (j < tiles) sum = fma(values[j][k], other_x[j][k], sum);
        if (!diagonal || j < i) mirrored[j][k] = fma(values[j][k], own_x, mirrored[j][k]);
      }
    }
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (c == 0) shared[i * kTile + r] = sum;
  }
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) {
        mirrored[j][k] += __shfl_xor_sync(kAllLanes, mirrored[j][k], distance);
      }
      if (r == 0) columns[warp * kSquare + j * kTile + c + k] = mirrored[j][k];
    }
  }
  __syncthreads();
  const Index first_row = square.row * kSquare, first_column = square.column * kSquare;
  for (int at = static_cast<int>(threadIdx.x); at < kSquare; at += kThreads) {
    double column = 0;
    for (int w = 0; w < kWarps; ++w) column += columns[w * kSquare + at];
    if (!diagonal) store_global(partial + square.row * a.length + first_column + at, column);
    if (first_row + at < a.length) {
      store_global(partial + square.column * a.length + first_row + at,
                   diagonal ? shared[at] + column : shared[at]);
    }
  }
  __syncthreads();
}

// The pair's dots, and whether it fits.
template <class T>
__device__ __forceinline__ void judge_pair(const Iteration<T>& a, double* shared) {
  double ss = 0, sy = 0, yy = 0, sg = 0;
  if (a.pair.offered) {
#pragma unroll 4
    for (Index i = threadIdx.x; i < a.numel; i += kThreads) {
      const double g = a.g(i), s = a.s(i), y = g - a.g_prev(i);
      ss = fma(s, s, ss), sy = fma(s, y, sy), yy = fma(y, y, yy), sg = fma(s, g, sg);
    }
  }
  const double* const sums = block_sum_of_four(shared, ss, sy, yy, sg);
  if (threadIdx.x != 0) return;
  Plan& plan = *a.plan;
  plan.ss = sums[0], plan.sy = sums[1], plan.yy = sums[2], plan.sg = sums[3];
  plan.fits = a.pair.offered &&
              fits_as_pair(plan.sy, plan.yy, sqrt(plan.ss) * sqrt(plan.yy), a.pair.curvature_tol);
}

// The coefficients of a term's vectors in H g, and in H g_prev where that is not known.
template <class T>
__device__ __forceinline__ void weigh_term(const Iteration<T>& a, int term, double* shared) {
  const bool both = a.is_unknown();
  const double *const s_row = a.row(2 * term), *const w_row = a.row(2 * term + 1);
  double s_g = 0, w_g = 0, s_prev = 0, w_prev = 0;
#pragma unroll 4
  for (Index i = threadIdx.x; i < a.numel; i += kThreads) {
    const double g = a.g(i), s = load_global<double>(s_row + i), w = load_global<double>(w_row + i);
    s_g = fma(s, g, s_g), w_g = fma(w, g, w_g);
    if (both) {
      const double g_prev = a.g_prev(i);
      s_prev = fma(s, g_prev, s_prev), w_prev = fma(w, g_prev, w_prev);
    }
  }
  const double* const sums = block_sum_of_four(shared, s_g, w_g, s_prev, w_prev);
  if (threadIdx.x != 0) return;
  const double* const a_of = a.a_of(term);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const double s = sums[2 * which], w = sums[2 * which + 1];
    a.plan->coefs[which][2 * term] = a_of[0] * s + a_of[1] * w;
    a.plan->coefs[which][2 * term + 1] = a_of[1] * s + a_of[2] * w;
  }
}

// Block 0: the pair; then a block for each term there is room for; the others: the matrix.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) dense_product_kernel(const Iteration<T> a) {
  FUSE_SHARED(double, shared);
  const Index block = static_cast<Index>(blockIdx.x) - 1;
  if (block < 0) return judge_pair(a, shared);
  if (a.is_identity()) return;
  if (block < a.most_terms) {
    if (block < Held(a.numbers, a.most_terms).terms) weigh_term(a, static_cast<int>(block), shared);
    return;
  }
  const Index rows = square_rows(a.numel), squares = tiles_before(rows);
  const Index blocks = static_cast<Index>(gridDim.x) - 1 - a.most_terms;
  const bool both = a.is_unknown();
  for (Index number = block - a.most_terms; number < squares; number += blocks) {
    const Square square(number);
    const auto g = [&](Index i) { return a.common_element(a.grad, i); };
    square_product(a, square, g, a.partial, shared);
    if (both) {
      const auto g_prev = [&](Index i) { return a.common_element(a.grad_prev, i); };
      square_product(a, square, g_prev, a.partial + rows * a.length, shared);
    }
  }
}

// An element of H g, or of H g_prev: `which`.
template <class T>
__device__ __forceinline__ double product_at(const Iteration<T>& a, const Held& held, int which,
                                             Index i) {
  const Index rows = square_rows(a.numel);
  const double* const partial = a.partial + which * rows * a.length + i;
  double sum = 0;
#pragma unroll 8
  for (Index column = 0; column < rows; ++column) {
    sum += load_global<double>(partial + column * a.length);
  }
#pragma unroll 4
  for (int q = 0; q < 2 * held.terms; ++q) {
    sum = fma(a.plan->coefs[which][q], load_global<double>(a.row(q) + i), sum);
  }
  return held.scale * sum;
}

// One thread: the update, and all numbers that do not depend on the direction.
template <class T>
__device__ __forceinline__ void decide(const Iteration<T>& a) {
  Plan& plan = *a.plan;
  plan.begins = 0, plan.taken_in = 0, plan.term = -1;
  plan.gamma = plan.tau = 1.0, plan.of_s = plan.of_w = 0.0;
  if (a.pair.offered) {
    a.head[kPairCosine] = plan.sy / (sqrt(plan.ss) * sqrt(plan.yy));
    a.head[kYDotY] = plan.yy;
    a.head[plan.fits ? kAccepted : kSkipped] += 1.0;
  }
  if (plan.fits) {
    const double step = a.pair.step, gamma = plan.sy / plan.yy;
    const bool exact = a.numbers[kExact] != 0.0;
    Curvature of{};
    of.ss = plan.ss, of.sy = plan.sy, of.yy = plan.yy;
    of.y_h_y = a.is_identity() ? 0.0 : plan.y_h_y;
    of.s_b_s = exact ? -step * step * a.head[kDirectionDotGrad] : 0.0;
    const Held held(a.numbers, a.most_terms);
    int terms = held.terms;
    double scale = held.scale, pairs = a.numbers[kPairs], wg = plan.wg;
    // The first pair, or one that rounding has left no positive definite H for.
    if (!(of.y_h_y > 0.0) || !is_finite(of.y_h_y)) {
      plan.begins = 1;
      terms = 0, scale = gamma, pairs = 0.0, wg = gamma * plan.yg;
      of.y_h_y = of.sy;
      of.s_b_s = of.ss / gamma;
    }
    const Update update = broyden_update(of, a.formula);
    const Term term = term_of(of, update);
    scale /= update.tau;
    double* const a_of = a.a_of(terms);
    a_of[0] = term.ss / scale, a_of[1] = term.sw / scale, a_of[2] = term.ww / scale;
    const bool full = terms + 1 == a.most_terms;
    a.head[kGamma] = plan.gamma = gamma;
    plan.tau = update.tau;
    plan.of_s = term.ss * plan.sg + term.sw * wg;
    plan.of_w = term.sw * plan.sg + term.ww * wg;
    plan.term = terms;
    plan.taken_in = full ? terms + 1 : 0;
    plan.scale = scale;
    a.numbers[kScale] = full ? 1.0 : scale;
    a.numbers[kTerms] = full ? 0.0 : terms + 1.0;
    a.numbers[kPairs] = pairs + 1.0;
  }
  a.head[kUsable] = a.numbers[kPairs];
  a.numbers[kKnown] = 1.0;
  a.numbers[kExact] = a.lr_scale == nullptr ? 1.0 : 0.0;
}

// Leaves H g in the last row of vectors, and w in the row behind the last term's.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) dense_join_kernel(const Iteration<T> a) {
  FUSE_SHARED(double, shared);
  const GridSums sums(shared, 3, 0, whole_grid(a.workspace));
  const Held held(a.numbers, a.most_terms);
  const bool identity = a.is_identity(), unknown = a.is_unknown(), fits = a.plan->fits != 0;
  double *const known = a.known_product(), *const w_row = a.row(2 * held.terms + 1);
  double y_h_y = 0, wg = 0, yg = 0;
  for (Index tile = first_tile(); tile * kWarp < a.length; tile += tile_stride()) {
    const Index i = tile * kWarp + lane_of_thread();
    if (i >= a.length) continue;
    const double g = a.g(i), product = identity ? g : product_at(a, held, 0, i);
    if (fits) {
      const double y = g - a.g_prev(i);
      yg = fma(y, g, yg);
      if (!identity) {
        const double before = unknown ? product_at(a, held, 1, i) : load_global<double>(known + i);
        const double w = i < a.numel ? product - before : 0.0;
        y_h_y = fma(w, y, y_h_y), wg = fma(w, g, wg);
        store_global(w_row + i, w);
      }
    }
    store_global(known + i, product);
  }
  const double sum = warp_sum_of_four(y_h_y, wg, yg, 0.0);
  const int lane = lane_of_thread();
  if (lane < 3) sums.cell(lane) = sum;
  const bool last = sums.finish([&](int column, double total) {
    (column == 0 ? a.plan->y_h_y : column == 1 ? a.plan->wg : a.plan->yg) = total;
  });
  if (last && threadIdx.x == 0) decide(a);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) dense_finish_kernel(const Iteration<T> a) {
  FUSE_SHARED(double, shared);
  const GridSums sums(shared, 3, 1, whole_grid(a.workspace));
  const Plan& plan = *a.plan;
  const int term = plan.term;
  const bool begins = plan.begins != 0;
  const double gamma = plan.gamma, tau = plan.tau, of_s = plan.of_s, of_w = plan.of_w;
  double* const known = a.known_product();
  double *const s_row = a.row(term < 0 ? 0 : 2 * term), *const w_row = s_row + a.stride;
  double slope = 0, square = 0, largest = 0;
  for (Index tile = first_tile(); tile * kWarp < a.length; tile += tile_stride()) {
    const Index i = tile * kWarp + lane_of_thread();
    if (i >= a.length) continue;
    const double g = a.g(i);
    double product = load_global<double>(known + i);
    if (term >= 0) {
      const double s = a.s(i);
      double w;
      if (begins) {
        w = gamma * (g - a.g_prev(i));
        product = gamma * g;
        store_global(w_row + i, w);
      } else {
        w = load_global<double>(w_row + i);
      }
      store_global(s_row + i, s);
      product = product / tau + of_s * s + of_w * w;
      store_global(known + i, product);
    }
    if (i >= a.numel) continue;
    const double share =
        a.lr_scale == nullptr ? 1.0 : static_cast<double>(load_global<T>(a.lr_scale + i));
    const T rounded = static_cast<T>(-share * product);
    store_global(a.direction + i, rounded);
    store_global(a.grad_prev + i, a.grad[i]);
    const double p = static_cast<double>(rounded);
    slope = fma(p, g, slope), square = fma(p, p, square);
    largest = larger(largest, magnitude_of(p));
  }
  const double sum = warp_sum_of_four(slope, square, 0.0, 0.0), maximum = warp_max(largest);
  const int lane = lane_of_thread();
  if (lane < 2) sums.cell(lane) = sum;
  if (lane == 0) sums.cell(2) = maximum;
  static_assert(kDirectionSq == kDirectionDotGrad + 1 && kDirectionMax == kDirectionSq + 1);
  sums.finish([&](int column, double total) { a.head[kDirectionDotGrad + column] = total; });
}

// A warp takes a square's row of tiles at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) dense_take_in_kernel(const Iteration<T> a) {
  const int terms = a.plan->taken_in;
  const bool begins = a.plan->begins != 0;
  if (terms == 0 && !begins) return;
  const double scale = terms == 0 ? 1.0 : a.plan->scale;
  const Index rows = tile_rows(a.numel), squares = tiles_before(square_rows(a.numel));
  const int lane = lane_of_thread(), r = row_of_lane(), c = column_of_lane();
  for (Index piece = first_tile(); piece < squares * kSide; piece += tile_stride()) {
    const Square square(piece / kSide);
    const int i = static_cast<int>(piece % kSide), tiles = square.tiles(i);
    const Index tile_row = square.tile_row(i);
    if (tile_row >= rows) continue;
    double sums[kSide][2];
#pragma unroll
    for (int j = 0; j < kSide; ++j) sums[j][0] = sums[j][1] = 0;
#pragma unroll 1
    for (int term = 0; term < terms; ++term) {
      const double *const s_row = a.row(2 * term), *const w_row = s_row + a.stride;
      const double* const a_of = a.a_of(term);
      const double s = load_common<double>(s_row + tile_row * kTile + r);
      const double w = load_common<double>(w_row + tile_row * kTile + r);
      const double of_s = a_of[0] * s + a_of[1] * w, of_w = a_of[1] * s + a_of[2] * w;
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        if (j >= tiles) break;
        const Index at = square.tile_column(j) * kTile + c;
        double other_s[2], other_w[2];
        load_common_two(s_row + at, a.aligned, other_s);
        load_common_two(w_row + at, a.aligned, other_w);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          sums[j][k] = fma(of_w, other_w[k], fma(of_s, other_s[k], sums[j][k]));
        }
      }
    }
    double* const to =
        a.matrix + (tiles_before(tile_row) + square.tile_column(0)) * kTileSize + 2 * lane;
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      if (j >= tiles) break;
      double values[2];
      if (begins) {
        const bool diagonal = square.tile_column(j) == tile_row;
        values[0] = diagonal && r == c ? 1.0 : 0.0;
        values[1] = diagonal && r == c + 1 ? 1.0 : 0.0;
      } else {
        load_two(to + j * kTileSize, a.aligned, values);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) values[k] = scale * (values[k] + sums[j][k]);
      if (square.tile_column(j) == tile_row) {
        // Rounding is not symmetric, and no pair would ever take that away: each would divide it
        // by tau. Above the diagonal stands what the mirror image's lane has below it.
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int from = (c + k) * (kTile / 2) + r / 2;
          const double even = __shfl_sync(kAllLanes, values[0], from);
          const double odd = __shfl_sync(kAllLanes, values[1], from);
          if (r < c + k) values[k] = r % 2 == 0 ? even : odd;
        }
      }
      store_two(to + j * kTileSize, a.aligned, values);
    }
  }
}

}  // namespace

std::int64_t dense_memory_size(std::int64_t numel, bool offers_pair) {
  const Index length = tile_rows(numel) * kTile;
  return kPlanSize + (offers_pair ? 2 : 1) * square_rows(numel) * length;
}

void launch_dense_direction(const Dense& of, const DensePair& pair, const Formula& formula,
                            double* memory, Workspace workspace, void* stream) {
  with_state_type(of.dtype, [&](auto zero) {
    using T = decltype(zero);
    Iteration<T> a{};
    a.grad = static_cast<const T*>(of.grad);
    a.lr_scale = static_cast<const T*>(of.lr_scale);
    a.grad_prev = static_cast<T*>(of.grad_prev);
    a.direction = static_cast<T*>(of.direction);
    a.pair = pair;
    a.formula = formula;
    a.matrix = of.matrix, a.vectors = of.vectors, a.numbers = of.numbers, a.head = of.head;
    a.plan = reinterpret_cast<Plan*>(memory);
    a.partial = memory + kPlanSize;
    a.numel = of.numel, a.length = tile_rows(of.numel) * kTile, a.stride = of.stride;
    a.most_terms = static_cast<int>(of.most_terms);
    a.aligned = is_aligned(of.matrix, 16) && is_aligned(of.vectors, 16) && of.stride % 2 == 0;
    a.workspace = workspace;
    const Index squares = tiles_before(square_rows(of.numel));
    const Index shared_bytes = (1 + kWarps) * kSquare * static_cast<Index>(sizeof(double));
    const Index over_elements = blocks_for((a.length + kWarp - 1) / kWarp);
    FUSE_LAUNCH((dense_product_kernel<T>), 1 + of.most_terms + blocks_for(squares, 1), shared_bytes,
                stream, a);
    FUSE_LAUNCH((dense_join_kernel<T>), over_elements, sums_bytes(3), stream, a);
    FUSE_LAUNCH((dense_finish_kernel<T>), over_elements, sums_bytes(3), stream, a);
    // Without a pair the matrix stays.
    if (!pair.offered) return;
    FUSE_LAUNCH((dense_take_in_kernel<T>), blocks_for(squares * kSide), 0, stream, a);
  });
}

}  // namespace fuse_ext::cuda
