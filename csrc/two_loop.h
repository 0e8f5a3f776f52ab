// L-BFGS on scalars: the ring of curvature pairs, its Gram matrix and the two-loop recursion
// (Algorithm 2), in float64. Shared by every backend; vectors never appear here.
//
// The history has `slots` = history_size + 1 slots of two rows each. The slot `open` is being
// filled: its S row is the current direction p and its Y row becomes y = g - g_prev. The `count`
// slots before it, cyclically, hold the pairs, newest first. A pair's step is
// s_i = row_scale[i] * S[i], so that a row can be written before its step length is known.
#pragma once

#include <cmath>

#include "numeric.h"

namespace fuse_ext {

// Named places in the float64 vector of scalars; the arrays follow at kHeaderSize.
enum Scalar : int {
  kCount,  // pairs in the ring
  kOpen,   // slot being filled
  kGamma,  // s.y / y.y of the newest pair: the scale of the initial inverse Hessian
  kDirectionDotGrad,
  kDirectionSq,   // p.p
  kDirectionMax,  // max |p|
  kAccepted,      // pairs accepted since the start
  kSkipped,       // pairs refused by the curvature test
  kPairCosine,    // s.y / (|s| |y|) of the last pair offered
  kYDotY,         // raw dots of the update pass with the pair being formed
  kHeaderSize = 16,
};

enum ScalarArray : int {
  kRowScale,  // [slots]
  kGradS,     // [slots]        g . S[i]
  kGradY,     // [slots]        g . Y[i]
  kYS,        // [slots]        y . S[i]
  kYY,        // [slots]        y . Y[i]
  kCoefS,     // [slots]        p = coef_g g + sum coef_s[i] S[i] + coef_y[i] Y[i]
  kCoefY,     // [slots]
  kCoefG,     // [1]
  kGramSY,    // [slots, slots] s_i . y_j, valid where pair j is at least as new as pair i
  kGramYY,    // [slots, slots] y_i . y_j
  kScalarArrays,
};

FUSE_INLINE std::int64_t scalar_array_size(ScalarArray array, std::int64_t slots) {
  if (array == kCoefG) return 1;
  return array == kGramSY || array == kGramYY ? slots * slots : slots;
}

FUSE_INLINE std::int64_t scalar_offset(ScalarArray array, std::int64_t slots) {
  std::int64_t offset = kHeaderSize;
  for (int i = 0; i < array; ++i) offset += scalar_array_size(static_cast<ScalarArray>(i), slots);
  return offset;
}

struct LbfgsScalars {
  double* data;
  std::int64_t slots;

  FUSE_MEMBER double& operator[](Scalar name) const { return data[name]; }
  FUSE_MEMBER double* array(ScalarArray name) const { return data + scalar_offset(name, slots); }
  FUSE_MEMBER std::int64_t count() const { return static_cast<std::int64_t>(data[kCount]); }
  FUSE_MEMBER std::int64_t open() const { return static_cast<std::int64_t>(data[kOpen]); }
  // Slot of the age-th newest pair (0 = newest).
  FUSE_MEMBER std::int64_t slot(std::int64_t age) const {
    return (open() + slots - 1 - age) % slots;
  }
};

// Closes the open slot into a pair of the ring when s.y > curvature_tol |s| |y| (a test that no
// rescaling of the loss or of the variables changes); else the slot stays open.
FUSE_INLINE bool commit_pair(LbfgsScalars state, double step_length, double curvature_tol) {
  const std::int64_t open = state.open(), slots = state.slots;
  double *row_scale = state.array(kRowScale), *gram_sy = state.array(kGramSY),
         *gram_yy = state.array(kGramYY);
  const double *y_s = state.array(kYS), *y_y = state.array(kYY);
  const double sy = step_length * y_s[open], yy = state[kYDotY];
  const double norms = sqrt(step_length * step_length * state[kDirectionSq]) * sqrt(yy);
  state[kPairCosine] = sy / norms;
  if (!(sy > curvature_tol * norms) || !(yy > 0.0) || !is_finite(norms) || !is_finite(sy)) {
    state[kSkipped] += 1.0;
    return false;
  }
  row_scale[open] = step_length;
  for (std::int64_t age = 0; age < state.count(); ++age) {
    const std::int64_t i = state.slot(age);
    gram_sy[i * slots + open] = row_scale[i] * y_s[i];
    gram_yy[i * slots + open] = gram_yy[open * slots + i] = y_y[i];
  }
  gram_sy[open * slots + open] = sy;
  gram_yy[open * slots + open] = yy;
  state[kGamma] = sy / yy;
  state[kAccepted] += 1.0;
  state[kCount] = static_cast<double>(state.count() + 1 < slots ? state.count() + 1 : slots - 1);
  state[kOpen] = static_cast<double>((open + 1) % slots);
  return true;
}

// Algorithm 2 with the second loop running from the oldest pair to the newest (Nocedal and
// Wright, Algorithm 7.4), on dot products instead of vectors: p = -H g as coefficients of
// g and of the rows.
FUSE_INLINE void two_loop(LbfgsScalars state) {
  const std::int64_t slots = state.slots, count = state.count();
  const double *row_scale = state.array(kRowScale), *grad_s = state.array(kGradS),
               *grad_y = state.array(kGradY), *gram_sy = state.array(kGramSY),
               *gram_yy = state.array(kGramYY);
  double *coef_s = state.array(kCoefS), *coef_y = state.array(kCoefY);
  const double gamma = count > 0 ? state[kGamma] : 1.0;
  // First loop; coef_y[i] holds alpha_i.
  for (std::int64_t age = 0; age < count; ++age) {
    const std::int64_t i = state.slot(age);
    double s_dot_p = -row_scale[i] * grad_s[i];
    for (std::int64_t newer = 0; newer < age; ++newer) {
      const std::int64_t j = state.slot(newer);
      s_dot_p -= coef_y[j] * gram_sy[i * slots + j];
    }
    coef_y[i] = s_dot_p / gram_sy[i * slots + i];
  }
  // Second loop; coef_s[i] holds alpha_i - beta_i.
  for (std::int64_t age = count; age-- > 0;) {
    const std::int64_t i = state.slot(age);
    double y_dot_p = -gamma * grad_y[i];
    for (std::int64_t other = 0; other < count; ++other) {
      const std::int64_t j = state.slot(other);
      y_dot_p -= gamma * coef_y[j] * gram_yy[i * slots + j];
      if (other > age) y_dot_p += coef_s[j] * gram_sy[j * slots + i];
    }
    coef_s[i] = coef_y[i] - y_dot_p / gram_sy[i * slots + i];
  }
  for (std::int64_t age = 0; age < count; ++age) {
    const std::int64_t i = state.slot(age);
    coef_y[i] *= -gamma;
    coef_s[i] *= row_scale[i];
  }
  *state.array(kCoefG) = -gamma;
}

}  // namespace fuse_ext
