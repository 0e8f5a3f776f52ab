// What an L-BFGS iteration with a fixed step decides on the device, so that the host need not read
// anything between two steps: whether the gradient may be used, whether a pair is in waiting, how
// long the step is, and what to do where a direction does not descend. Shared by every backend; the
// vectors are elsewhere.
//
// An iteration is lbfgs_update, lbfgs_decide, lbfgs_direction, lbfgs_move, which hand each other
// the float64 vector `control`. It decides as LbfgsPhase does on the host.
#pragma once

#include "two_loop.h"

namespace fuse_ext {

// Named places in `control`.
enum Control : int {
  kPairStep,        // t of the pair in waiting (x has moved by t p, y is not known); 0: none
  kMove,            // what lbfgs_direction and lbfgs_move do next: a Move
  kStepLength,      // t of that move
  kSlopeTolerance,  // no step where -g.p is at most this
  kReset,           // not 0: the next recursion forgets all pairs first
  kTaken,           // t of the last step that was taken
  kReason,          // why the last iteration ended as it did: a Reason
  // Norms of the effective gradient of the last update. The last two are maxima.
  kGradSquare,
  kGradSum,
  kGradLargest,
  kParamLargest,  // max |x| when there was last no usable pair
  // What Setbacks (fuse_ext/objective/setbacks.py) counts under these names.
  kBadStarts,  // in a row
  kCuts,
  kIterations,
  kNonFinite,
  kResets,
  kStepCuts,
  kControlSize,
};
constexpr int kNorms = kParamLargest - kGradSquare + 1, kLargestNorms = 2;

// A Move, as `control` holds it.
constexpr double kStay = 0;    // nothing
constexpr double kGo = 1;      // x <- x + t p, with the old x kept as the origin
constexpr double kReturn = 2;  // x <- the origin: the last step is undone

enum Reason : int {
  kNotStarted,
  kStepped,
  kNonFinitePoint,
  kZeroLr,
  kGradient,
  kSlope,
  kNoDescent
};

// What the host tells an iteration.
struct FixedStep {
  double lr;  // the step, once the curvature is known
  double curvature_tol, tolerance_grad, tolerance_change;
  double eps;        // rounding of the parameters' arithmetic
  double patience;   // after so many starts in a row that are not finite the last step is undone
  bool closes_pair;  // the gradient completes the pair in waiting, and no step follows
  double loss;       // where the gradient was taken; 0 if it is not known
};

// Each time that not even -g leads anywhere the next step along it is cut by this factor.
constexpr double kCut = 0.1, kMostCuts = 15.0;

// The first step: of 1-norm about lr, but long enough that rounding does not hide it, as
// Precision.visible_step has it.
FUSE_INLINE double first_step_length(const double* control, const FixedStep& told) {
  const double whole = 1.0 / control[kGradSum];
  double step = whole < 1.0 ? whole : 1.0;
  const double visible = sqrt(told.eps) * control[kParamLargest] / control[kGradLargest];
  if (is_finite(visible) && visible > step) step = visible;
  return step * pow(kCut, control[kCuts]) * told.lr;
}

FUSE_INLINE void forget_pairs(LbfgsScalars state, double* control) {
  state[kCount] = state[kGamma] = state[kUsable] = 0.0;
  control[kResets] += 1.0;
}

// At a point that is not finite. Nothing of it is used; the step that led there may be undone, and
// the next one is another.
FUSE_INLINE void refuse_point(LbfgsScalars state, double* control, const FixedStep& told) {
  const bool waiting = control[kPairStep] != 0.0;
  if (told.closes_pair && !waiting) return;  // no step has led there: it has been counted
  control[kNonFinite] += 1.0;
  control[kReason] = kNonFinitePoint;
  if (!told.closes_pair) control[kBadStarts] += 1.0;
  if (!waiting || !(told.closes_pair || control[kBadStarts] > told.patience)) return;
  control[kMove] = kReturn;
  control[kPairStep] = 0.0;
  if (state[kUsable] > 0.0) {  // in the recursion that led there, whatever the set is now
    forget_pairs(state, control);
  } else {
    if (control[kCuts] < kMostCuts) control[kCuts] += 1.0;
    control[kStepCuts] += 1.0;
  }
}

// g.p of the direction to come, from the coefficients and the dots that they were made of.
FUSE_INLINE double slope_to_come(LbfgsScalars state, const double* control) {
  double slope = *state.array(kCoefG) * control[kGradSquare];
  const double* chosen = state.array(kChosen);
  for (std::int64_t age = 0; age < static_cast<std::int64_t>(state[kUsable]); ++age) {
    const std::int64_t i = static_cast<std::int64_t>(chosen[age]);
    slope += state.array(kCoefS)[i] * state.array(kGradS)[i] +
             state.array(kCoefY)[i] * state.array(kGradY)[i];
  }
  return slope;
}

// Between the passes: closes the pair in waiting, runs the recursion, and settles the move.
template <class Team = Alone>
FUSE_INLINE void decide_step(LbfgsScalars state, double* control, const FixedStep& told,
                             const Team& team = {}) {
  const bool leads = team.rank() == 0;
  const bool finite = is_finite(control[kGradSquare]) && is_finite(told.loss);
  const bool reset = control[kReset] != 0.0;
  const bool stays =
      !told.closes_pair && (told.lr == 0.0 || control[kGradLargest] <= told.tolerance_grad);
  const double pair_step = control[kPairStep];
  team.sync();  // everyone has read what changes now
  if (leads) {
    control[kMove] = kStay;
    control[kSlopeTolerance] = told.tolerance_change;
    if (!finite) refuse_point(state, control, told);
    if (finite && !told.closes_pair) control[kBadStarts] = 0.0;
    if (finite && stays) control[kReason] = told.lr == 0.0 ? kZeroLr : kGradient;
    if (finite && !stays && reset) {
      forget_pairs(state, control);
      control[kReset] = 0.0;
    }
  }
  team.sync();
  if (!finite || stays) return;
  if (pair_step != 0.0) commit_pair(state, pair_step, told.curvature_tol, team);
  if (leads) control[kPairStep] = 0.0;
  if (told.closes_pair) return;
  two_loop(state, team);
  team.sync();
  if (!leads) return;
  const double slope = slope_to_come(state, control);
  if (state[kUsable] > 0.0 && !(slope < 0.0 && is_finite(slope))) {
    forget_pairs(state, control);
    *state.array(kCoefG) = -1.0;
  }
  control[kIterations] += 1.0;
  control[kMove] = kGo;
  if (state[kUsable] > 0.0) {
    control[kCuts] = 0.0;
    control[kStepLength] = told.lr;
  } else {
    control[kStepLength] = first_step_length(control, told);
  }
}

// Whether the direction as it is, rounded and scaled by the parameters' shares, is one to step
// along: kStepped, or why not.
FUSE_INLINE Reason judge_direction(LbfgsScalars state, const double* control) {
  const double slope = state[kDirectionDotGrad];
  if (!(slope < 0.0 && is_finite(state[kDirectionSq]))) return kNoDescent;
  return -slope <= control[kSlopeTolerance] ? kSlope : kStepped;
}

// What lbfgs_move does with a `control`: x <- origin + step * p, with `save` after origin <- x.
struct MoveOrder {
  bool stay;
  double step;
  bool save;
};

FUSE_INLINE MoveOrder move_order(LbfgsScalars state, const double* control) {
  if (control[kMove] == kReturn) return {false, 0.0, false};
  const bool go = control[kMove] == kGo && judge_direction(state, control) == kStepped;
  return {!go, go ? control[kStepLength] : 0.0, true};
}

// Notes what has come of the move; to be called once. Changes nothing that move_order reads.
FUSE_INLINE void note_move(LbfgsScalars state, double* control) {
  if (control[kMove] != kGo) return;
  const Reason reason = judge_direction(state, control);
  control[kReason] = reason;
  if (reason == kStepped) {
    control[kPairStep] = control[kTaken] = control[kStepLength];
  } else if (reason == kNoDescent && state[kUsable] > 0.0) {
    control[kReset] = 1.0;
  }
}

}  // namespace fuse_ext
