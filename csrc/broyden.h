// The dense inverse Hessian on scalars: how it is laid out, and the update formula. Shared by every
// backend; vectors never appear here.
//
// H = scale (M + sum over the terms j of [s_j w_j] A_j [s_j w_j]'), w_j = H y_j. M is symmetric,
// and its lower triangle lies in tiles of kTile x kTile doubles, row by row: tile (i, j), j <= i,
// is number i (i + 1) / 2 + j; tiles on the diagonal are whole. A pair adds a term instead of
// changing M, so that most iterations only read it; when there is room for no more terms, M takes
// them in.
//
// The formula is the self-scaled Broyden update (Al-Baali, Computational Optimization and
// Applications 9, 1998; Urban, Stefanou and Pons, arXiv 2405.04230): with b = s'Bs / s'y and
// h = y'Hy / s'y,
//   H+ = (H - Hy y'H / y'Hy + phi v v') / tau + s s' / s'y,  v = (y'Hy)^1/2 (s / s'y - Hy / y'Hy).
// phi = 1 and tau = min(1, 1 / b) is self-scaled BFGS, tau = 1 as well is BFGS. B s costs nothing,
// since s = -t H g: s'Bs = -t s'g. The first pair makes H = s'y / y'y I before it.
#pragma once

#include <cmath>

#include "numeric.h"

namespace fuse_ext {

constexpr std::int64_t kTile = 8;
constexpr std::int64_t kTileSize = kTile * kTile;

// Rows of tiles for so many parameters.
FUSE_INLINE std::int64_t tile_rows(std::int64_t numel) { return (numel + kTile - 1) / kTile; }
// Tiles before row i.
FUSE_INLINE std::int64_t tiles_before(std::int64_t i) { return i * (i + 1) / 2; }
FUSE_INLINE std::int64_t matrix_size(std::int64_t numel) {
  return tiles_before(tile_rows(numel)) * kTileSize;
}

// Named places in the float64 vector of a matrix's scalars; the terms' A follow at kMatrixHeader,
// three numbers each: of s s', of s w' (and w s'), of w w'.
enum MatrixScalar : int {
  kScale,  // of M and of the terms
  kTerms,  // held apart from M
  kPairs,  // taken in since M was the identity; 0: H is the identity, whatever M holds
  kKnown,  // 1: the last row of vectors is H g, g the previous gradient
  kExact,  // 1: the direction is that, negative
  kMatrixHeader = 8,
};
constexpr std::int64_t kTermSize = 3;

// Vectors that belong to a matrix, float64: s and w of each term, and in the last row H g.
FUSE_INLINE std::int64_t most_terms(std::int64_t rows) { return (rows - 1) / 2; }
// More would cost more in reading them than M costs.
constexpr std::int64_t kMostTerms = 32;

// What the update knows of a pair.
struct Curvature {
  double ss, sy, yy, y_h_y;
  double s_b_s;  // 0 where it is not known
};

struct Formula {
  std::int64_t taking_part;  // n: parameters that pairs are of
  bool broyden, self_scaling;
};

struct Update {
  double tau, phi;
};

FUSE_INLINE Update broyden_update(const Curvature& of, const Formula& formula) {
  // A direction that was not -H g (groups with different lr) says nothing of B: plain BFGS.
  if (!(of.s_b_s > 0.0) || !is_finite(of.s_b_s)) return {1.0, 1.0};
  const double b = of.s_b_s / of.sy, h = of.y_h_y / of.sy;
  const double shrink = formula.self_scaling && b > 1.0 ? 1.0 / b : 1.0;  // rho+
  // By Cauchy and Schwarz a >= 0; where it is no more than rounding the family is one point.
  const double a = b * h - 1.0;
  constexpr double kNoFamily = 1e-10;
  if (!formula.broyden || !(a > kNoFamily) || !is_finite(a)) return {shrink, 1.0};
  const double c = sqrt(a / (1.0 + a));
  const double smaller = h * (1.0 - c), rho = smaller < 1.0 ? smaller : 1.0;  // rho-
  if (!(rho > 0.0)) return {shrink, 1.0};                                     // a of more than 1e16
  const double low = (rho - 1.0) / a, high = 1.0 / rho, wanted = (1.0 - b) / b;
  const double below = wanted < high ? wanted : high, theta = below > low ? below : low;
  const double sigma = 1.0 + a * theta;
  const double phi = (1.0 - theta) / sigma;
  if (!(sigma > 0.0) || !is_finite(phi)) return {shrink, 1.0};
  if (!formula.self_scaling) return {1.0, phi};
  const double n = formula.taking_part > 2 ? static_cast<double>(formula.taking_part - 1) : 1.0;
  const double root = pow(sigma, -1.0 / n);
  double tau;
  if (theta > 0.0) {
    tau = shrink * (root < 1.0 / theta ? root : 1.0 / theta);
  } else {
    tau = shrink * root < sigma ? shrink * root : sigma;
  }
  return tau > 0.0 && is_finite(1.0 / tau) ? Update{tau, phi} : Update{shrink, 1.0};
}

// A of the term that the update is, beside H / tau.
struct Term {
  double ss, sw, ww;
};

FUSE_INLINE Term term_of(const Curvature& of, const Update& update) {
  const double tau = update.tau, phi = update.phi;
  return {(1.0 + phi * of.y_h_y / of.sy / tau) / of.sy, -phi / of.sy / tau,
          (phi - 1.0) / of.y_h_y / tau};
}

}  // namespace fuse_ext
