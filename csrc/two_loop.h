// L-BFGS on scalars: the ring of curvature pairs, its Gram matrix and the two-loop recursion
// (Algorithm 2), in float64. Shared by every backend; vectors never appear here.
// With self-scaling (Oren and Luenberger's, as in Al-Baali, Computational Optimization and
// Applications 9, 1998, pp. 191-203) H is first divided by tau = min(1, s.y / s.B s) <= 1 at every
// pair, and the recursion begins with the scale of the oldest pair instead of the newest one's.
// B s costs nothing, since s = -t H g: s.B s = -t s.g.
//
// The history has `slots` = history_size + 1 slots of two rows each. The slot `open` is being
// filled: its S row is the current direction p and its Y row becomes y = g - g_prev. The `count`
// slots before it, cyclically, hold the pairs, newest first. A pair's step is
// s_i = row_scale[i] * S[i], so that a row can be written before its step length is known.
//
// A pair belongs to a set of parameters, those that had a gradient when it was made: of the others
// it says nothing. The recursion uses the pairs of the present set; the rest stay in the ring until
// their set is the present one again.
#pragma once

#include <cmath>

#include "numeric.h"

namespace fuse_ext {

// Named places in the float64 vector of scalars; the arrays follow at kHeaderSize.
enum Scalar : int {
  kCount,  // pairs in the ring
  kOpen,   // slot being filled
  kGamma,  // s.y / y.y of the newest (self-scaling: oldest) pair: the initial inverse Hessian's
  kDirectionDotGrad,
  kDirectionSq,   // p.p
  kDirectionMax,  // max |p|
  kAccepted,      // pairs accepted since the ring was made
  kSkipped,       // pairs refused by the curvature test
  kPairCosine,    // s.y / (|s| |y|) of the last pair offered
  kYDotY,         // raw dots of the update pass with the pair being formed
  kSelfScaling,   // 1: pairs from now on scale the inverse Hessian before them
  kUsable,        // pairs of the present set, as the last recursion found them
  kSet,           // number of the present set; the host writes it
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
  kGrowth,    // [slots]        1 / tau - 1 of the pair; 0 without self-scaling
  kGrown,     // [slots]        product of 1 / tau over all newer pairs
  kGramSY,    // [slots, slots] s_i . y_j, valid where pair j is at least as new as pair i
  kGramYY,    // [slots, slots] y_i . y_j
  // Behind all others: without them it is the vector of scalars that older checkpoints hold.
  kPairSet,  // [slots]         number of the pair's set
  kChosen,   // [slots]         slots of the usable pairs, newest first: the recursion's scratch
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
    const std::int64_t slot = open() - 1 - age;
    return slot < 0 ? slot + slots : slot;
  }
};

// Pairs of the present set, counted up to `enough`: for what comes before the recursion, since when
// kUsable was written the set may have been another.
FUSE_INLINE std::int64_t usable_pairs(LbfgsScalars state, std::int64_t enough) {
  const double *pair_set = state.array(kPairSet), set = state[kSet];
  const std::int64_t count = state.count();
  std::int64_t usable = 0;
  for (std::int64_t age = 0; age < count && usable < enough; ++age) {
    if (pair_set[state.slot(age)] == set) ++usable;
  }
  return usable;
}
FUSE_INLINE std::int64_t usable_pairs(LbfgsScalars state) {
  return usable_pairs(state, state.slots);
}

// Who runs the functions below: `size` threads that share the work and wait for each other. This
// is one thread alone, for CPUs.
struct Alone {
  FUSE_MEMBER std::int64_t rank() const { return 0; }
  FUSE_MEMBER std::int64_t size() const { return 1; }
  FUSE_MEMBER void sync() const {}
};

// s.y > curvature_tol |s| |y|, with `norms` = |s| |y|: a test that no rescaling of the loss or of
// the variables changes.
FUSE_INLINE bool fits_as_pair(double sy, double yy, double norms, double curvature_tol) {
  return sy > curvature_tol * norms && yy > 0.0 && is_finite(norms) && is_finite(sy);
}

// Closes the open slot into a pair of the ring where it fits; else the slot stays open. A full ring
// drops its `dropped` oldest pairs.
template <class Team = Alone>
FUSE_INLINE bool commit_pair(LbfgsScalars state, double step_length, double curvature_tol,
                             const Team& team = {}, std::int64_t dropped = 1) {
  const std::int64_t open = state.open(), count = state.count(), slots = state.slots;
  double *row_scale = state.array(kRowScale), *gram_sy = state.array(kGramSY),
         *gram_yy = state.array(kGramYY), *growth = state.array(kGrowth);
  const double *y_s = state.array(kYS), *y_y = state.array(kYY);
  const double sy = step_length * y_s[open], yy = state[kYDotY];
  const double norms = sqrt(step_length * step_length * state[kDirectionSq]) * sqrt(yy);
  const bool accepted = fits_as_pair(sy, yy, norms, curvature_tol);
  if (accepted) {
    for (std::int64_t age = team.rank(); age < count; age += team.size()) {
      const std::int64_t i = state.slot(age);
      gram_sy[i * slots + open] = row_scale[i] * y_s[i];
      gram_yy[i * slots + open] = gram_yy[open * slots + i] = y_y[i];
    }
  }
  team.sync();  // everyone has read the header that changes now
  if (team.rank() == 0) {
    state[kPairCosine] = sy / norms;
    state[accepted ? kAccepted : kSkipped] += 1.0;
    if (accepted) {
      const bool scaling = state[kSelfScaling] != 0.0;
      const double s_b_s = -step_length * step_length * state[kDirectionDotGrad];
      row_scale[open] = step_length;
      state.array(kPairSet)[open] = state[kSet];
      growth[open] = scaling && s_b_s > sy && is_finite(s_b_s / sy) ? s_b_s / sy - 1.0 : 0.0;
      gram_sy[open * slots + open] = sy;
      gram_yy[open * slots + open] = yy;
      state[kCount] = static_cast<double>(count + 1 < slots ? count + 1 : count + 1 - dropped);
      state[kOpen] = static_cast<double>((open + 1) % slots);
      const std::int64_t first = scaling ? state.slot(state.count() - 1) : open;
      state[kGamma] = gram_sy[first * slots + first] / gram_yy[first * slots + first];
    }
  }
  team.sync();
  return accepted;
}

// Notes the usable pairs, newest first, and gives their number; of the others nothing will be read.
template <class Team = Alone>
FUSE_INLINE std::int64_t choose_pairs(LbfgsScalars state, const Team& team = {}) {
  const std::int64_t held = state.count();
  const double *growth = state.array(kGrowth), *pair_set = state.array(kPairSet), set = state[kSet];
  double *coef_s = state.array(kCoefS), *coef_y = state.array(kCoefY), *grown = state.array(kGrown),
         *chosen = state.array(kChosen);
  if (team.rank() == 0) {
    std::int64_t found = 0;
    double product = 1.0;
    for (std::int64_t age = 0; age < held; ++age) {
      const std::int64_t i = state.slot(age);
      if (pair_set[i] != set) continue;
      chosen[found++] = static_cast<double>(i);
      grown[i] = product;
      product *= 1.0 + growth[i];
    }
    state[kUsable] = static_cast<double>(found);
  }
  // Pass 2 reads the rows of all pairs.
  for (std::int64_t age = team.rank(); age < held; age += team.size()) {
    const std::int64_t i = state.slot(age);
    if (pair_set[i] != set) coef_s[i] = coef_y[i] = 0.0;
  }
  team.sync();
  return static_cast<std::int64_t>(state[kUsable]);
}

// Algorithm 2 with the second loop running from the oldest pair to the newest (Nocedal and
// Wright, Algorithm 7.4), on dot products instead of vectors: p = -H g as coefficients of
// g and of the rows. Each step of a loop updates the dot products of all pairs to come, which
// are independent of each other. Ages count the usable pairs only; where all are usable, results
// are those of a ring without sets to the bit.
template <class Team = Alone>
FUSE_INLINE void recursion_of_chosen(LbfgsScalars state, std::int64_t count,
                                     const Team& team = {}) {
  const std::int64_t slots = state.slots, held = state.count();
  const std::int64_t rank = team.rank(), size = team.size();
  const double *row_scale = state.array(kRowScale), *grad_s = state.array(kGradS),
               *grad_y = state.array(kGradY), *gram_sy = state.array(kGramSY),
               *gram_yy = state.array(kGramYY), *growth = state.array(kGrowth),
               *grown = state.array(kGrown), *chosen = state.array(kChosen);
  double *coef_s = state.array(kCoefS), *coef_y = state.array(kCoefY);
  const auto slot = [chosen](std::int64_t age) { return static_cast<std::int64_t>(chosen[age]); };
  double gamma = count > 0 ? state[kGamma] : 1.0;
  if (count > 0 && count < held) {
    const std::int64_t first = slot(state[kSelfScaling] != 0.0 ? count - 1 : 0);
    gamma = gram_sy[first * slots + first] / gram_yy[first * slots + first];
  }
  // First loop, newest pair first; coef_y[i] holds s_i . p until alpha_i follows from it.
  for (std::int64_t age = rank; age < count; age += size) {
    const std::int64_t i = slot(age);
    coef_y[i] = -row_scale[i] * grad_s[i];
  }
  for (std::int64_t newer = 0; newer < count; ++newer) {
    team.sync();
    const std::int64_t j = slot(newer);
    const double alpha = coef_y[j] / gram_sy[j * slots + j];
    for (std::int64_t age = newer + 1 + rank; age < count; age += size) {
      const std::int64_t i = slot(age);
      coef_y[i] -= alpha * gram_sy[i * slots + j];
    }
  }
  team.sync();
  for (std::int64_t age = rank; age < count; age += size) {
    const std::int64_t i = slot(age);
    coef_y[i] /= gram_sy[i * slots + i];
  }
  team.sync();
  // Second loop, oldest pair first; coef_s[i] holds y_i . p until alpha_i - beta_i follows. p grows
  // by 1 / tau before each pair but the oldest.
  for (std::int64_t age = rank; age < count; age += size) {
    const std::int64_t i = slot(age);
    double y_dot_p = -gamma * grad_y[i];
    for (std::int64_t other = 0; other < count; ++other) {
      const std::int64_t j = slot(other);
      y_dot_p -= gamma * coef_y[j] * gram_yy[i * slots + j];
    }
    coef_s[i] = y_dot_p;
  }
  for (std::int64_t older = count - 1; older > 0; --older) {
    team.sync();
    const std::int64_t j = slot(older);
    const double change = coef_y[j] - coef_s[j] / gram_sy[j * slots + j];
    const double growing = 1.0 + growth[slot(older - 1)];
    for (std::int64_t age = rank; age < older; age += size) {
      const std::int64_t i = slot(age);
      coef_s[i] = (coef_s[i] + change * gram_sy[j * slots + i]) * growing;
    }
  }
  team.sync();
  const double initial = count > 0 ? -gamma * grown[slot(count - 1)] : -gamma;
  for (std::int64_t age = rank; age < count; age += size) {
    const std::int64_t i = slot(age);
    coef_s[i] = row_scale[i] * (coef_y[i] - coef_s[i] / gram_sy[i * slots + i]) * grown[i];
    coef_y[i] *= initial;
  }
  if (rank == 0) *state.array(kCoefG) = initial;
}

template <class Team = Alone>
FUSE_INLINE void two_loop(LbfgsScalars state, const Team& team = {}) {
  recursion_of_chosen(state, choose_pairs(state, team), team);
}

}  // namespace fuse_ext
