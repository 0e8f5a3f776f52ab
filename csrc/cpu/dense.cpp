// The dense quasi-Newton direction for CPU tensors.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../adapters.h"
#include "../two_loop.h"
#include "parallel.h"

namespace fuse_ext {
namespace {

// Consecutive rows of tiles with about as many tiles in each part. Every part has a sum of its own,
// so that results do not depend on the number of threads.
class Parts {
 public:
  explicit Parts(std::int64_t rows) : rows_(rows) {
    // Of fewer rows a part's own sum would be no longer cheap beside its tiles.
    constexpr std::int64_t kRowsEach = 8, kMost = 32;
    while (2 * count_ <= kMost && 2 * count_ * kRowsEach <= rows) count_ *= 2;
  }
  std::int64_t count() const { return count_; }
  std::int64_t begin(std::int64_t part) const {
    const double share = static_cast<double>(part) / static_cast<double>(count_);
    return std::lround(static_cast<double>(rows_) * std::sqrt(share));
  }
  std::int64_t end(std::int64_t part) const { return begin(part + 1); }
  // Parts that are worth a thread together.
  std::int64_t grain() const {
    return kWorthAThread * count_ / (tiles_before(rows_) * kTileSize + 1) + 1;
  }

 private:
  std::int64_t rows_, count_ = 1;
};

class DenseMatrix {
 public:
  explicit DenseMatrix(const DenseArguments& of)
      : of_(of),
        kernels_(cpu_kernels().dense),
        parts_(tile_rows(of.numel)),
        length_(tile_rows(of.numel) * kTile) {}

  std::int64_t length() const { return length_; }
  double* row(std::int64_t i) const { return of_.vectors + i * of_.stride; }
  double* known_product() const { return row(2 * of_.most_terms); }
  double number(MatrixScalar name) const { return of_.numbers[name]; }
  std::int64_t terms() const { return static_cast<std::int64_t>(number(kTerms)); }

  // M = I, and nothing else.
  void become_identity(double scale) const {
    const std::int64_t rows = tile_rows(of_.numel);
    at::parallel_for(0, parts_.count(), parts_.grain(), [&](std::int64_t from, std::int64_t to) {
      const std::int64_t first = parts_.begin(from), last = parts_.begin(to);
      std::fill(of_.matrix + tiles_before(first) * kTileSize,
                of_.matrix + tiles_before(last) * kTileSize, 0.0);
    });
    for (std::int64_t i = 0; i < rows; ++i) {
      double* tile = of_.matrix + (tiles_before(i) + i) * kTileSize;
      for (std::int64_t r = 0; r < kTile; ++r) tile[r * kTile + r] = 1.0;
    }
    of_.numbers[kScale] = scale;
    of_.numbers[kTerms] = of_.numbers[kPairs] = 0.0;
  }

  // out = H x; both whole tiles long.
  void product(const double* x, double* out) const {
    if (number(kPairs) == 0.0) {
      std::copy(x, x + length_, out);
      return;
    }
    const std::int64_t count = parts_.count();
    std::vector<double> partial(static_cast<std::size_t>(count * length_));
    at::parallel_for(0, count, parts_.grain(), [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t part = from; part < to; ++part) {
        kernels_.product(of_.matrix, parts_.begin(part), parts_.end(part), x,
                         partial.data() + part * length_);
      }
    });
    std::fill(out, out + length_, 0.0);
    for (std::int64_t part = 0; part < count; ++part) {
      const double* sum = partial.data() + part * length_;
      const std::int64_t end = parts_.end(part) * kTile;  // columns are no further
      for (std::int64_t i = 0; i < end; ++i) out[i] += sum[i];
    }
    const std::int64_t held = terms();
    double dots[2 * kMostTerms], coefs[2 * kMostTerms];
    kernels_.dots(of_.vectors, of_.stride, 2 * held, length_, x, dots);
    for (std::int64_t t = 0; t < held; ++t) {
      const double* a = term(t);
      coefs[2 * t] = a[0] * dots[2 * t] + a[1] * dots[2 * t + 1];
      coefs[2 * t + 1] = a[1] * dots[2 * t] + a[2] * dots[2 * t + 1];
    }
    kernels_.sum(of_.vectors, of_.stride, 2 * held, length_, coefs, out);
    for (std::int64_t i = 0; i < length_; ++i) out[i] *= number(kScale);
  }

  // H = H / tau + the term of the vectors that lie behind the last one.
  void add(const Term& term, double tau) const {
    const double scale = number(kScale) / tau;
    double* a = this->term(terms());
    a[0] = term.ss / scale, a[1] = term.sw / scale, a[2] = term.ww / scale;
    of_.numbers[kScale] = scale;
    of_.numbers[kTerms] += 1.0;
    of_.numbers[kPairs] += 1.0;
    if (terms() == of_.most_terms) take_in();
  }

 private:
  double* term(std::int64_t t) const { return of_.numbers + kMatrixHeader + t * kTermSize; }

  void take_in() const {
    at::parallel_for(0, parts_.count(), parts_.grain(), [&](std::int64_t from, std::int64_t to) {
      kernels_.take_in(of_.matrix, parts_.begin(from), parts_.begin(to), number(kScale),
                       of_.vectors, of_.stride, term(0), terms());
    });
    of_.numbers[kScale] = 1.0;
    of_.numbers[kTerms] = 0.0;
  }

  const DenseArguments& of_;
  const DenseKernels& kernels_;
  Parts parts_;
  std::int64_t length_;
};

double dot(const double* a, const double* b, std::int64_t n) {
  double sum;
  cpu_kernels().dense.dots(a, 0, 1, n, b, &sum);
  return sum;
}

template <class T>
class DenseStep {
 public:
  DenseStep(const DenseArguments& of, const T* grad, T* grad_prev, T* direction, const T* lr_scale)
      : of_(of),
        matrix_(of),
        grad_(grad),
        grad_prev_(grad_prev),
        direction_(direction),
        lr_scale_(lr_scale),
        x_(whole()),
        product_(whole()) {
    std::copy(grad, grad + of.numel, x_.begin());
  }

  void run(std::optional<double> pair_step, double curvature_tol, const Formula& formula) {
    if (!pair_step || !take_pair(*pair_step, curvature_tol, formula)) {
      matrix_.product(x_.data(), product_.data());
    }
    finish();
  }

 private:
  std::vector<double> whole() const {
    return std::vector<double>(static_cast<std::size_t>(matrix_.length()));
  }

  // Takes the pair in and leaves H g in product_; false where the pair is refused.
  bool take_pair(double t, double curvature_tol, const Formula& formula) {
    const std::int64_t n = of_.numel, length = matrix_.length();
    double *s = matrix_.row(2 * matrix_.terms()), *w = s + of_.stride;
    std::vector<double> y = whole();
    std::fill(s + n, s + length, 0.0);
    for (std::int64_t i = 0; i < n; ++i) {
      s[i] = t * static_cast<double>(direction_[i]);
      y[static_cast<std::size_t>(i)] =
          x_[static_cast<std::size_t>(i)] - static_cast<double>(grad_prev_[i]);
    }
    Curvature pair{.ss = dot(s, s, length),
                   .sy = dot(s, y.data(), length),
                   .yy = dot(y.data(), y.data(), length),
                   .y_h_y = 0.0,
                   .s_b_s = number(kExact) != 0.0 ? -t * t * of_.head[kDirectionDotGrad] : 0.0};
    const double norms = std::sqrt(pair.ss) * std::sqrt(pair.yy);
    const bool fits = fits_as_pair(pair.sy, pair.yy, norms, curvature_tol);
    of_.head[kPairCosine] = pair.sy / norms;
    of_.head[kYDotY] = pair.yy;
    of_.head[fits ? kAccepted : kSkipped] += 1.0;
    if (!fits) return false;
    of_.head[kGamma] = pair.sy / pair.yy;
    if (number(kPairs) != 0.0) {
      matrix_.product(x_.data(), product_.data());
      double* before = matrix_.known_product();
      if (number(kKnown) == 0.0) {
        std::vector<double> old = whole();
        std::copy(grad_prev_, grad_prev_ + n, old.begin());
        matrix_.product(old.data(), before);
      }
      for (std::int64_t i = 0; i < length; ++i) {
        w[i] = product_[static_cast<std::size_t>(i)] - before[i];
      }
      pair.y_h_y = dot(w, y.data(), length);
    }
    // The first pair, or one that rounding has left no positive definite H for.
    if (!(pair.y_h_y > 0.0) || !is_finite(pair.y_h_y)) {
      const double gamma = pair.sy / pair.yy;
      // The rows of the first term.
      if (s != matrix_.row(0)) std::copy(s, s + length, matrix_.row(0));
      s = matrix_.row(0), w = matrix_.row(1);
      matrix_.become_identity(gamma);
      for (std::int64_t i = 0; i < length; ++i) {
        w[i] = gamma * y[static_cast<std::size_t>(i)];
        product_[static_cast<std::size_t>(i)] = gamma * x_[static_cast<std::size_t>(i)];
      }
      pair.y_h_y = pair.sy;
      pair.s_b_s = pair.ss / gamma;
    }
    const Update update = broyden_update(pair, formula);
    const Term term = term_of(pair, update);
    const double sg = dot(s, x_.data(), length), wg = dot(w, x_.data(), length);
    const double of_s = term.ss * sg + term.sw * wg, of_w = term.sw * sg + term.ww * wg;
    for (std::int64_t i = 0; i < length; ++i) {
      double& p = product_[static_cast<std::size_t>(i)];
      p = p / update.tau + of_s * s[i] + of_w * w[i];
    }
    matrix_.add(term, update.tau);
    return true;
  }

  // The direction and its numbers.
  void finish() {
    double* known = matrix_.known_product();
    std::copy(product_.begin(), product_.end(), known);
    double dot_grad = 0.0, square = 0.0, largest = 0.0;
    for (std::int64_t i = 0; i < of_.numel; ++i) {
      const double share = lr_scale_ == nullptr ? 1.0 : static_cast<double>(lr_scale_[i]);
      const T rounded = static_cast<T>(-share * known[i]);
      direction_[i] = rounded;
      grad_prev_[i] = grad_[i];
      const double p = static_cast<double>(rounded);
      dot_grad += p * static_cast<double>(grad_[i]);
      square += p * p;
      if (std::fabs(p) > largest) largest = std::fabs(p);
    }
    of_.head[kDirectionDotGrad] = dot_grad;
    of_.head[kDirectionSq] = square;
    of_.head[kDirectionMax] = largest;
    of_.head[kUsable] = number(kPairs);
    of_.numbers[kKnown] = 1.0;
    of_.numbers[kExact] = lr_scale_ == nullptr;
  }

  double number(MatrixScalar name) const { return matrix_.number(name); }

  const DenseArguments& of_;
  DenseMatrix matrix_;
  const T* grad_;
  T *grad_prev_, *direction_;
  const T* lr_scale_;
  std::vector<double> x_, product_;
};

void dense_direction(const at::Tensor& grad, at::Tensor grad_prev, at::Tensor direction,
                     at::Tensor matrix, at::Tensor vectors, at::Tensor matrix_scalars,
                     at::Tensor scalars, const std::optional<at::Tensor>& lr_scale,
                     std::optional<double> pair_step, double curvature_tol,
                     std::int64_t taking_part, bool broyden, bool self_scaling) {
  const DenseArguments of(grad, grad_prev, direction, matrix, vectors, matrix_scalars, scalars,
                          lr_scale);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* shares = lr_scale ? lr_scale->const_data_ptr<T>() : nullptr;
    DenseStep<T>(of, grad.const_data_ptr<T>(), grad_prev.data_ptr<T>(), direction.data_ptr<T>(),
                 shares)
        .run(pair_step, curvature_tol, {taking_part, broyden, self_scaling});
  };
  if (of.dtype == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
  for (const auto& tensor : {grad_prev, direction, matrix, vectors, matrix_scalars, scalars}) {
    bump_version(tensor);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fuse_ext, CPU, m) { m.impl("dense_direction", &dense_direction); }

}  // namespace fuse_ext
