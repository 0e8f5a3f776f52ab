// CPU kernels on raw pointers: the streaming loops of the Adam step and of the
// L-BFGS passes.
//
// Every kernel works on the flat range [begin, end) of a segment table and
// writes its partial sums to `out`; the caller splits the whole range into
// chunks, runs them in parallel and adds the partial results in a fixed order.
// T is the arithmetic and state type (float or double).
#pragma once

#include <type_traits>

#include "../adam.h"
#include "../broyden.h"
#include "../row.h"
#include "../segments.h"
#include "../stats.h"

namespace fuse_ext {

// Sums are taken in T over runs of this many elements (the passes over the history also add up the
// runs of a block in T), then in double.
constexpr std::int64_t kRun = 1024;
// Elements per block: a block of the gradient, of y and of the output stays in
// L1/L2 while the history's rows stream past. Chunks of long ranges are multiples of it.
constexpr std::int64_t kBlock = 8192;

// What a kernel stores past the caches.
enum class PastCaches {
  nothing,
  // Parameters of T that another core holds: to write to lines which it has read, they must be
  // taken from it one by one, and where the two cores share no cache that takes far longer than it
  // takes the next reader to fetch all of them from the memory.
  params,
  // Vectors of T that are only written, where nothing would be left of them in a cache.
  vectors,
};

// Places in combine's output.
enum DirectionStat : int { kDotGrad, kSq, kMax, kDirectionStats };

template <class T>
struct StateKernels {
  // Eq. 2 on parameters and moments; out[0] = sum of squared gradients.
  // max_exp_avg_sq may be null (no amsgrad).
  void (*adam)(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* exp_avg,
               T* exp_avg_sq, T* max_exp_avg_sq, const AdamCoefficients<T>& coefficients,
               double* out);

  // Norms of the effective gradient g = sign * grad + weight_decay * param, and
  // its dot product with `direction` (which may be null).
  void (*grad_stats)(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
                     const Row* direction, double* out);

  // out[0] = max |x| over the parameters.
  void (*largest_param)(const SegmentTable& table, std::int64_t begin, std::int64_t end,
                        double* out);

  // Pass 1. With y_row (not null), which may be one of the rows: y = g - grad_prev, rounded to the
  // row's dtype and stored, before the rows are read. out = [g . row, for all rows][y . row, for
  // all rows]. grad_prev may be the same memory as y_row.
  void (*dots)(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
               const T* grad_prev, const Row* y_row, const Rows& rows, double* out);

  // Pass 2. p = coef_g g + sum coefs[i] rows[i], scaled by the segments'
  // lr_scale, rounded to the row's dtype and stored in p_row; grad_prev <- g.
  // With an origin (not null), then as in move with save.
  void (*combine)(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
                  const Rows& rows, const double* coefs, double coef_g, const Row& p_row,
                  T* grad_prev, T* origin, double step, PastCaches past, double* out);

  // param = origin + step * row; with save, origin <- param first. step 0
  // restores exactly.
  void (*move)(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* origin,
               const Row& row, double step, bool save, PastCaches past);

  // Algorithm 3: param = theta * param + (1 - theta) * (origin + step * row);
  // row <- the step really taken; out[0] = its squared norm.
  void (*blend)(const SegmentTable& table, std::int64_t begin, std::int64_t end, const T* origin,
                const Row& row, double theta, double step, double* out);

  // flat <- stored gradients, and back.
  void (*gather)(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* flat);
  void (*scatter)(const SegmentTable& table, std::int64_t begin, std::int64_t end, const T* flat);
};

// Passes over the dense inverse Hessian (broyden.h), and over vectors that lie row by row, `stride`
// apart. Lengths and ranges are in whole tiles.
struct DenseKernels {
  // y += what the rows of tiles [first, last), and their mirror images, give of M x; y is whole.
  void (*product)(const double* matrix, std::int64_t first, std::int64_t last, const double* x,
                  double* y);

  // The rows of tiles [first, last) of M = scale (M + the terms).
  void (*take_in)(double* matrix, std::int64_t first, std::int64_t last, double scale,
                  const double* vectors, std::int64_t stride, const double* terms,
                  std::int64_t count);

  // out[q] = vectors[q] . x
  void (*dots)(const double* vectors, std::int64_t stride, std::int64_t count, std::int64_t length,
               const double* x, double* out);

  // y += sum of coefs[q] vectors[q]
  void (*sum)(const double* vectors, std::int64_t stride, std::int64_t count, std::int64_t length,
              const double* coefs, double* y);
};

struct CpuKernels {
  const char* level;  // instruction set they were compiled for
  StateKernels<float> f32;
  StateKernels<double> f64;
  // Eq. 2 in float, with moments kept in bfloat16: their rounding is random, by `key`.
  void (*adam_bf16)(const SegmentTable& table, std::int64_t begin, std::int64_t end,
                    BFloat16* exp_avg, BFloat16* exp_avg_sq, BFloat16* max_exp_avg_sq,
                    const AdamCoefficients<float>& coefficients, const RandomKey& key, double* out);
  DenseKernels dense;

  template <class T>
  const StateKernels<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }
};

// The best level that this CPU can run, or the one named by FUSE_EXT_CPU_LEVEL
// (default, avx2, avx512). Throws std::runtime_error for a level that does not
// exist here.
const CpuKernels& cpu_kernels();

extern const CpuKernels kernels_default;
#if defined(__x86_64__)
#define FUSE_EXT_X86_LEVELS 1
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

}  // namespace fuse_ext
