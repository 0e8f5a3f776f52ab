// The self-scaled Broyden update (broyden.h) on the pairs of a ring, on scalars alone: what takes
// the place of the two-loop recursion. Shared by every backend; vectors never appear here.
//
// With the members 0 .. k - 1, oldest first, and H_j, B_j = 1 / H_j as they are before pair j,
//   H = scale (gamma I + sum over j of [s_j w_j] A_j [s_j w_j]'),  w_j = H_j y_j,
//   B = dual (I / gamma + sum over j of [y_j v_j] C_j [y_j v_j]'), v_j = B_j s_j.
// w_j and v_j are combinations of s_i and y_i, i <= j, whose coefficients are kept, so that a
// product with H costs O(k^2) operations on the products of its operand with the rows, and a new
// pair as many. The formula needs b = s'Bs / s'y and h = y'Hy / s'y where a pair comes in the
// order of its members. Of H alone BFGS could be had from two loops; phi and tau are functions of
// both, and frozen as they were when the pair was new, with pairs before it that are forgotten by
// now, they gain nothing over it. So where pairs are dropped all of this is built anew, which takes
// O(k^3): half of a full ring is dropped at once.
//
// Products of s_j with the rows of older pairs, which no pass makes, follow from how the direction
// was made: p = -H g is a combination of g and of the rows. They are known among pairs of one run:
// one ends where a direction was not -H g (groups with different lr). Where the newest pair has no
// run the recursion is two_loop.
#pragma once

#include "broyden.h"
#include "two_loop.h"

namespace fuse_ext {

// Named places in the float64 vector `broyden` beside the scalars; arrays follow at kBroydenHeader.
enum BroydenScalar : int {
  kTakingPart,   // parameters that pairs are of; the host writes it
  kRuns,         // runs so far
  kMadeBy,       // run whose members made the direction; 0: it was -g or two_loop's; -1: scaled
  kHeld,         // members that the arrays by member are of
  kHeldRun,      // their run
  kInitial,      // gamma
  kInverseUnit,  // scale
  kDirectUnit,   // dual
  kBroydenHeader = 16,
};

// By slot, and by member.
enum BroydenArray : int {
  kRunOf,         // [slots]         run of the slot's pair; 0: none
  kAlongS,        // [slots]         p . s_i
  kAlongY,        // [slots]         p . y_i
  kMember,        // [slots]         the members' slots
  kInverseTerms,  // [3, slots]      A_j / scale: of s s', of s w' (and w s'), of w w'
  kDirectTerms,   // [3, slots]      C_j / dual
  kScratch,       // [8, slots]
  kGramSS,        // [slots, slots]  s_i . s_j, by slot
  kInverseOwn,    // [slots, slots]  of w_j (row j), the coefficients of s_i
  kInverseOther,  // [slots, slots]  and of y_i
  kDirectOwn,     // [slots, slots]  of v_j, the coefficients of y_i
  kDirectOther,   // [slots, slots]  and of s_i
  kBroydenArrays,
};

FUSE_INLINE std::int64_t broyden_array_size(BroydenArray array, std::int64_t slots) {
  if (array >= kGramSS) return slots * slots;
  return array == kScratch ? 8 * slots : array >= kInverseTerms ? 3 * slots : slots;
}

FUSE_INLINE std::int64_t broyden_offset(BroydenArray array, std::int64_t slots) {
  std::int64_t offset = kBroydenHeader;
  for (int i = 0; i < array; ++i) {
    offset += broyden_array_size(static_cast<BroydenArray>(i), slots);
  }
  return offset;
}

struct BroydenScalars {
  double* data;  // null: BFGS
  std::int64_t slots;

  FUSE_MEMBER double& operator[](BroydenScalar name) const { return data[name]; }
  FUSE_MEMBER double* array(BroydenArray name) const { return data + broyden_offset(name, slots); }
  FUSE_MEMBER double* scratch(int which) const { return array(kScratch) + which * slots; }
  // Slot of a member; never outside of the ring, whatever a damaged vector says.
  FUSE_MEMBER std::int64_t slot(std::int64_t member) const {
    const double slot = array(kMember)[member];
    return slot >= 0.0 && slot < static_cast<double>(slots) ? static_cast<std::int64_t>(slot) : 0;
  }
  FUSE_MEMBER std::int64_t held() const {
    const double held = data[kHeld];
    return held >= 0.0 && held < static_cast<double>(slots) ? static_cast<std::int64_t>(held) : 0;
  }
};

// H or B of the members before one, without what multiplies the identity.
struct Form {
  const double *own, *other, *terms;
  double unit;
  std::int64_t slots;
};

FUSE_INLINE Form inverse_form(BroydenScalars of) {
  return {of.array(kInverseOwn), of.array(kInverseOther), of.array(kInverseTerms), of[kInverseUnit],
          of.slots};
}
FUSE_INLINE Form direct_form(BroydenScalars of) {
  return {of.array(kDirectOwn), of.array(kDirectOther), of.array(kDirectTerms), of[kDirectUnit],
          of.slots};
}

// Four sums, so that additions do not wait for each other.
FUSE_INLINE double dot(const double* a, const double* b, std::int64_t n) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int k = 0; k < 4; ++k) sums[k] += a[i + k] * b[i + k];
  }
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The form of n members times x, from x's products with the rows: `x_own` with those that stand
// alone in a term (s_i for H, y_i for B), `x_other` with the others. Writes the coefficients of
// both; `alone` and `mixed` are scratch.
template <class Team>
FUSE_INLINE void times(const Form& form, std::int64_t n, const double* x_own, const double* x_other,
                       double* out_own, double* out_other, double* alone, double* mixed,
                       const Team& team) {
  const std::int64_t rank = team.rank(), size = team.size(), slots = form.slots;
  for (std::int64_t j = rank; j < n; j += size) {
    const double with =
        dot(form.own + j * slots, x_own, j + 1) + dot(form.other + j * slots, x_other, j + 1);
    const double *a = form.terms + j, own = x_own[j];
    alone[j] = form.unit * (a[0] * own + a[slots] * with);
    mixed[j] = form.unit * (a[slots] * own + a[2 * slots] * with);
  }
  team.sync();
  for (std::int64_t i = rank; i < n; i += size) {
    out_own[i] = alone[i];
    out_other[i] = 0.0;
  }
  for (std::int64_t j = 0; j < n; ++j) {  // every thread adds to numbers of its own
    const double factor = mixed[j], *own = form.own + j * slots, *other = form.other + j * slots;
    for (std::int64_t i = rank; i <= j; i += size) {
      out_own[i] += factor * own[i];
      out_other[i] += factor * other[i];
    }
  }
  team.sync();
}

// What a pair is to its members' forms: the row of w_j or v_j, and y'Hy or s'Bs.
template <class Team>
FUSE_INLINE double extend(const Form& form, std::int64_t j, const double* x_own,
                          const double* x_other, double square, double identity, double* row_own,
                          double* row_other, double* alone, double* mixed, const Team& team) {
  times(form, j, x_own, x_other, row_own, row_other, alone, mixed, team);
  const double first = form.unit * identity;
  const double form_of_x = dot(row_own, x_own, j) + dot(row_other, x_other, j) + first * square;
  if (team.rank() == 0) row_own[j] = 0.0, row_other[j] = first;
  return form_of_x;
}

// Member j joins those before it; false where rounding has left H or B not positive along it.
// `s_b_s`: from the direction, where that was made by them; else 0.
template <class Team>
FUSE_INLINE bool join(LbfgsScalars state, BroydenScalars of, std::int64_t j, double s_b_s,
                      const Team& team) {
  const std::int64_t slots = of.slots, i = of.slot(j), rank = team.rank(), size = team.size();
  const double *gram_sy = state.array(kGramSY), *gram_yy = state.array(kGramYY),
               *gram_ss = of.array(kGramSS);
  const double sy = gram_sy[i * slots + i], yy = gram_yy[i * slots + i],
               ss = gram_ss[i * slots + i];
  double *y_own = of.scratch(0), *y_other = of.scratch(1), *s_own = of.scratch(2),
         *s_other = of.scratch(3), *alone = of.scratch(4), *mixed = of.scratch(5);
  if (j == 0 && rank == 0) {
    of[kInitial] = sy / yy;
    of[kInverseUnit] = of[kDirectUnit] = 1.0;
  }
  for (std::int64_t member = rank; member < j; member += size) {
    const std::int64_t other = of.slot(member);
    y_own[member] = gram_sy[other * slots + i];
    y_other[member] = gram_yy[other * slots + i];
    s_own[member] = gram_sy[i * slots + other];
    s_other[member] = gram_ss[other * slots + i];
  }
  team.sync();
  const double gamma = of[kInitial];
  const Form inverse = inverse_form(of), direct = direct_form(of);
  const std::int64_t row = j * slots;
  const double y_h_y = extend(inverse, j, y_own, y_other, yy, gamma, of.array(kInverseOwn) + row,
                              of.array(kInverseOther) + row, alone, mixed, team);
  const double own_s_b_s =
      extend(direct, j, s_own, s_other, ss, 1.0 / gamma, of.array(kDirectOwn) + row,
             of.array(kDirectOther) + row, alone, mixed, team);
  const Curvature pair{ss, sy, yy, y_h_y, s_b_s > 0.0 ? s_b_s : own_s_b_s};
  const Formula formula{static_cast<std::int64_t>(of[kTakingPart]), true,
                        state[kSelfScaling] != 0.0};
  const Update update = j == 0 ? Update{1.0, 1.0} : broyden_update(pair, formula);
  const double tau = update.tau, phi = update.phi;
  const double a = pair.s_b_s / sy * (y_h_y / sy) - 1.0;
  const double theta = (1.0 - phi) / (1.0 + (a > 0.0 ? a : 0.0) * phi);
  const double inverse_unit = inverse.unit / tau, direct_unit = direct.unit * tau;
  const Term up = term_of(pair, update);
  const Term down{(1.0 + tau * theta * own_s_b_s / sy) / sy, -tau * theta / sy,
                  tau * (theta - 1.0) / own_s_b_s};
  // The first one is taken as it is: a direction that it makes of nonsense is no descent.
  const bool fits = j == 0 || (y_h_y > 0.0 && own_s_b_s > 0.0 && is_finite(up.ss + up.sw + up.ww) &&
                               is_finite(down.ss + down.sw + down.ww) &&
                               is_finite(1.0 / inverse_unit) && is_finite(1.0 / direct_unit));
  team.sync();  // everyone has read the units that change now
  if (fits && rank == 0) {
    double *inverse_terms = of.array(kInverseTerms) + j, *direct_terms = of.array(kDirectTerms) + j;
    of[kInverseUnit] = inverse_unit;
    inverse_terms[0] = up.ss / inverse_unit;
    inverse_terms[slots] = up.sw / inverse_unit;
    inverse_terms[2 * slots] = up.ww / inverse_unit;
    of[kDirectUnit] = direct_unit;
    direct_terms[0] = down.ss / direct_unit;
    direct_terms[slots] = down.sw / direct_unit;
    direct_terms[2 * slots] = down.ww / direct_unit;
    of[kHeld] = static_cast<double>(j + 1);
  }
  team.sync();
  return fits;
}

// Closes the open slot into a pair where it fits, as commit_pair, and notes what its step is to the
// members that made its direction.
template <class Team = Alone>
FUSE_INLINE bool commit_broyden_pair(LbfgsScalars state, BroydenScalars of, double step_length,
                                     double curvature_tol, const Team& team = {}) {
  const std::int64_t open = state.open(), slots = state.slots, held = of.held();
  const std::int64_t half = (slots - 1) / 2;
  if (!commit_pair(state, step_length, curvature_tol, team, half > 1 ? half : 1)) return false;
  const double made_by = of[kMadeBy];
  double *gram_ss = of.array(kGramSS), *gram_sy = state.array(kGramSY);
  const double *along_s = of.array(kAlongS), *along_y = of.array(kAlongY);
  for (std::int64_t j = team.rank(); made_by > 0.0 && j < held; j += team.size()) {
    const std::int64_t i = of.slot(j);
    gram_ss[i * slots + open] = gram_ss[open * slots + i] = step_length * along_s[i];
    gram_sy[open * slots + i] = step_length * along_y[i];
  }
  team.sync();
  if (team.rank() == 0) {
    gram_ss[open * slots + open] = step_length * step_length * state[kDirectionSq];
    gram_sy[open * slots + open] = step_length * state.array(kYS)[open];
    if (made_by == 0.0) of[kRuns] += 1.0;
    of.array(kRunOf)[open] = made_by > 0.0 ? made_by : made_by == 0.0 ? of[kRuns] : 0.0;
  }
  team.sync();
  return true;
}

// p = -H g as coefficients of g and of the members' rows, and p's products with these.
template <class Team>
FUSE_INLINE void direction_of(LbfgsScalars state, BroydenScalars of, std::int64_t count,
                              const Team& team) {
  const std::int64_t slots = of.slots, rank = team.rank(), size = team.size();
  const double *row_scale = state.array(kRowScale), *grad_s = state.array(kGradS),
               *grad_y = state.array(kGradY), *gram_sy = state.array(kGramSY),
               *gram_yy = state.array(kGramYY), *gram_ss = of.array(kGramSS);
  double *coef_s = state.array(kCoefS), *coef_y = state.array(kCoefY);
  double *x_own = of.scratch(0), *x_other = of.scratch(1), *out_own = of.scratch(2),
         *out_other = of.scratch(3), *with_s = of.scratch(6), *with_y = of.scratch(7);
  for (std::int64_t j = rank; j < count; j += size) {
    const std::int64_t i = of.slot(j);
    x_own[j] = row_scale[i] * grad_s[i];
    x_other[j] = grad_y[i];
  }
  team.sync();
  times(inverse_form(of), count, x_own, x_other, out_own, out_other, of.scratch(4), of.scratch(5),
        team);
  const double initial = -of[kInverseUnit] * of[kInitial];
  for (std::int64_t j = rank; j < count; j += size) {
    const std::int64_t i = of.slot(j);
    coef_s[i] = -row_scale[i] * out_own[j];
    coef_y[i] = -out_other[j];
    double s = 0.0, y = 0.0;
    for (std::int64_t other = 0; other < count; ++other) {
      const std::int64_t l = of.slot(other);
      s += out_own[other] * gram_ss[i * slots + l] + out_other[other] * gram_sy[i * slots + l];
      y += out_own[other] * gram_sy[l * slots + i] + out_other[other] * gram_yy[i * slots + l];
    }
    with_s[j] = initial * x_own[j] - s;
    with_y[j] = initial * x_other[j] - y;
  }
  team.sync();
  for (std::int64_t j = rank; j < count; j += size) {
    of.array(kAlongS)[of.slot(j)] = with_s[j];
    of.array(kAlongY)[of.slot(j)] = with_y[j];
  }
  if (rank == 0) *state.array(kCoefG) = initial;
}

// What follows pass 1: the direction of the pairs at hand as coefficients. `fresh`: the newest pair
// has just come in. `scaled`: pass 2 will multiply the direction by shares that are not all 1.
template <class Team = Alone>
FUSE_INLINE void broyden_recursion(LbfgsScalars state, BroydenScalars of, double step_length,
                                   bool fresh, bool scaled, const Team& team = {}) {
  const std::int64_t rank = team.rank(), size = team.size();
  const double *chosen = state.array(kChosen), *run_of = of.array(kRunOf);
  const std::int64_t usable = choose_pairs(state, team);
  const auto slot = [chosen](std::int64_t age) { return static_cast<std::int64_t>(chosen[age]); };
  double run = usable > 0 ? run_of[slot(0)] : 0.0;
  if (!(run > 0.0)) {
    recursion_of_chosen(state, usable, team);
    if (rank == 0) of[kMadeBy] = scaled ? -1.0 : 0.0, of[kHeld] = 0.0;
    team.sync();
    return;
  }
  std::int64_t count = 1;
  while (count < usable && run_of[slot(count)] == run) ++count;
  std::int64_t held = of.held();
  bool same = of[kHeldRun] == run && held <= count;
  for (std::int64_t j = 0; same && j < held; ++j) {
    same = of.array(kMember)[j] == chosen[count - 1 - j];
  }
  if (!same) held = 0;
  const double made_by = of[kMadeBy];
  // The direction was -H g of the members before this pair, so that B s = -t g.
  const bool known = fresh && same && made_by == run && held + 1 == count;
  const double s_b_s = known ? -step_length * step_length * state[kDirectionDotGrad] : 0.0;
  team.sync();
  for (std::int64_t age = rank; age < usable; age += size) {
    state.array(kCoefS)[slot(age)] = state.array(kCoefY)[slot(age)] = 0.0;
  }
  for (std::int64_t j = rank; j < count; j += size) of.array(kMember)[j] = chosen[count - 1 - j];
  if (rank == 0) of[kHeldRun] = run, of[kHeld] = static_cast<double>(held);
  team.sync();
  for (std::int64_t j = held; j < count; ++j) {
    if (join(state, of, j, j + 1 == count ? s_b_s : 0.0, team)) continue;
    // H begins anew with this pair, the first of another run.
    count -= j;
    run = of[kRuns] + 1.0;
    team.sync();
    for (std::int64_t i = rank; i < count; i += size) {
      of.array(kMember)[i] = chosen[count - 1 - i];
      of.array(kRunOf)[slot(i)] = run;
    }
    if (rank == 0) of[kRuns] = of[kHeldRun] = run, of[kHeld] = 0.0;
    team.sync();
    j = -1;
  }
  direction_of(state, of, count, team);
  if (rank == 0) of[kMadeBy] = scaled ? -1.0 : run;
  team.sync();
}

}  // namespace fuse_ext
