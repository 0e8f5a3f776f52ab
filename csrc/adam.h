// One element's Adam update (Eq. 2), shared by every backend.
#pragma once

#include <cmath>

#include "numeric.h"
#include "stochastic.h"

namespace fuse_ext {

// Everything that is the same for all elements of a step, computed once in double.
template <class T>
struct AdamCoefficients {
  T grad_scale;  // maps the stored gradient to the one minimised: -1 to maximise, 1/scale
  T l2;          // weight decay added to the gradient
  T keep;        // 1 - lr * weight_decay when the decay is decoupled (AdamW), else 1
  T beta1, beta2;
  T one_minus_beta1, one_minus_beta2;
  T step_size;    // lr / (1 - beta1^k)
  T root_scale;   // 1 / sqrt(1 - beta2^k)
  T eps_in_root;  // the paper's constant a, inside the root
  T eps;          // torch's epsilon, outside
};

struct AdamOptions {
  std::int64_t step;  // k + 1 of Eq. 2: the first step is 1
  double lr, beta1, beta2, eps, eps_in_root, weight_decay;
  bool decoupled_weight_decay, maximize;
  double grad_divisor;  // GradScaler's scale, 1 without one
};

// With eps_in_root = a and eps = 0 this is Eq. 2c:
//   x -= lr sqrt(1-beta2^k)/(1-beta1^k) m / sqrt(v + a).
template <class T>
FUSE_INLINE AdamCoefficients<T> adam_coefficients(const AdamOptions& options) {
  const double step = static_cast<double>(options.step);
  const double decay = options.lr * options.weight_decay;
  AdamCoefficients<T> c;
  c.grad_scale = static_cast<T>((options.maximize ? -1.0 : 1.0) / options.grad_divisor);
  c.l2 = static_cast<T>(options.decoupled_weight_decay ? 0.0 : options.weight_decay);
  c.keep = static_cast<T>(options.decoupled_weight_decay ? 1.0 - decay : 1.0);
  c.beta1 = static_cast<T>(options.beta1);
  c.beta2 = static_cast<T>(options.beta2);
  c.one_minus_beta1 = static_cast<T>(1.0 - options.beta1);
  c.one_minus_beta2 = static_cast<T>(1.0 - options.beta2);
  c.step_size = static_cast<T>(options.lr / (1.0 - pow(options.beta1, step)));
  c.root_scale = static_cast<T>(1.0 / sqrt(1.0 - pow(options.beta2, step)));
  c.eps_in_root = static_cast<T>(options.eps_in_root);
  c.eps = static_cast<T>(options.eps);
  return c;
}

// Whether most of what options can add to a step leaves it as it is.
template <class T>
FUSE_INLINE bool is_plain(const AdamCoefficients<T>& c) {
  return c.grad_scale == T(1) && c.l2 == T(0) && c.eps_in_root == T(0) && c.beta1 > T(0.5);
}

FUSE_INLINE float root(float value) { return sqrtf(value); }
FUSE_INLINE double root(double value) { return sqrt(value); }

// Updates param and moments in place; returns the gradient before weight decay, whose squares
// Eq. 3 sums. plain (which is_plain must allow) leaves out what changes no bit.
template <class T, bool amsgrad, bool plain = false>
FUSE_INLINE T adam_element(T& param, T stored_grad, T& exp_avg, T& exp_avg_sq, T* max_exp_avg_sq,
                           const AdamCoefficients<T>& c) {
  const T raw = plain ? stored_grad : stored_grad * c.grad_scale;
  const T grad = plain || c.l2 == T(0) ? raw : raw + c.l2 * param;
  // As torch's lerp: from the nearer end, so that beta1 = 0 gives the gradient itself.
  const T change = grad - exp_avg;
  exp_avg =
      plain || c.beta1 > T(0.5) ? exp_avg + c.one_minus_beta1 * change : grad - c.beta1 * change;
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;
  T second = exp_avg_sq;
  if (amsgrad) {
    second = *max_exp_avg_sq > exp_avg_sq ? *max_exp_avg_sq : exp_avg_sq;
    *max_exp_avg_sq = second;
  }
  const T denominator = root(plain ? second : second + c.eps_in_root) * c.root_scale + c.eps;
  param = param * c.keep - c.step_size * exp_avg / denominator;
  return raw;
}

// Keeps an element's moments in bfloat16. The averages are rounded at random: an update of less
// than half a unit in the last place, such as exp_avg_sq's with beta2 = 0.999, would be lost for
// good if they were rounded to nearest. The maximum takes no such updates, and random ones would
// raise it.
template <bool amsgrad>
FUSE_INLINE void store_moments(BFloat16* exp_avg, BFloat16* exp_avg_sq, BFloat16* max_exp_avg_sq,
                               float m, float v, float v_max, std::uint32_t random) {
  store_stochastic(exp_avg, m, random >> 16);
  store_stochastic(exp_avg_sq, v, random & 0xffffu);
  if (amsgrad) store(max_exp_avg_sq, v_max);
}

}  // namespace fuse_ext
