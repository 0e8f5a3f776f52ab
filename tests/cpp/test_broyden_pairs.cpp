// The Broyden update on pairs against the same update with explicit matrices, H and B side by side,
// at every ring index; half of a full ring is dropped at once.
#include "broyden_pairs.h"

#include <deque>
#include <string>
#include <vector>

#include "check.h"
#include "pairs.h"

using namespace fuse_ext;
using namespace pairs;

namespace {

Vector times(const Matrix& a, const Vector& x) {
  Vector out(kDim);
  for (int i = 0; i < kDim; ++i) out[i] = dot(a[i], x);
  return out;
}

Matrix identity(double scale) {
  Matrix out(kDim, Vector(kDim, 0.0));
  for (int i = 0; i < kDim; ++i) out[i][i] = scale;
  return out;
}

// factor (m - m x x'm / x'mx + share v v') + z z' / x'z, v = (x'mx)^1/2 (z / x'z - m x / x'mx): the
// family, for H with x = y and for B with x = s.
void update(Matrix& m, const Vector& x, const Vector& z, double factor, double share) {
  const Vector mx = times(m, x);
  const double x_m_x = dot(x, mx), xz = dot(x, z);
  for (int i = 0; i < kDim; ++i) {
    for (int j = 0; j < kDim; ++j) {
      const double vi = z[i] / xz - mx[i] / x_m_x, vj = z[j] / xz - mx[j] / x_m_x;
      m[i][j] =
          factor * (m[i][j] - mx[i] * mx[j] / x_m_x + share * x_m_x * vi * vj) + z[i] * z[j] / xz;
    }
  }
}

// H of the pairs alone, oldest first.
Matrix inverse_hessian(const std::deque<Pair>& pairs) {
  Matrix h = identity(1.0), b = identity(1.0);
  for (std::size_t k = 0; k < pairs.size(); ++k) {
    const auto& [s, y] = pairs[k];
    const double sy = dot(s, y);
    if (k == 0) h = identity(sy / dot(y, y)), b = identity(dot(y, y) / sy);
    const double y_h_y = dot(y, times(h, y)), s_b_s = dot(s, times(b, s));
    Update with{1.0, 1.0};
    if (k > 0) with = broyden_update({0.0, sy, 0.0, y_h_y, s_b_s}, {kDim, true, true});
    const double a = s_b_s / sy * y_h_y / sy - 1.0;
    const double theta = (1.0 - with.phi) / (1.0 + (a > 0 ? a : 0) * with.phi);
    update(h, y, s, 1.0 / with.tau, with.phi);
    update(b, s, y, with.tau, theta);
  }
  return h;
}

class Ring : public Rows {
 public:
  Ring(std::int64_t history_size, std::int64_t open)
      : Rows(history_size, open),
        broyden_(static_cast<std::size_t>(broyden_offset(kBroydenArrays, slots())), 0.0) {
    scalars()[kSelfScaling] = 1.0;
    broyden_[kTakingPart] = kDim;
  }

  BroydenScalars broyden() { return {broyden_.data(), slots()}; }

  Vector direction(const Vector& g, bool scaled = false) {
    note_gradient_everywhere(g);
    broyden_recursion(scalars(), broyden(), 0.0, false, scaled);
    return combine(g);
  }

  // The pair of a step t along p, with the recursion that follows, as an op has them.
  bool offer(const Vector& p, const Vector& g, const Vector& y, double t) {
    open_pair(p, y);
    scalars()[kDirectionDotGrad] = dot(p, g);
    note_gradient_everywhere(g);
    const bool fresh = commit_broyden_pair(scalars(), broyden(), t, 1e-8);
    broyden_recursion(scalars(), broyden(), t, fresh, false);
    return fresh;
  }

 private:
  void note_gradient_everywhere(const Vector& g) {
    for (std::int64_t i = 0; i < slots(); ++i) note_gradient(g, i);
  }

  Vector broyden_;
};

void check_ring(std::int64_t history_size, std::int64_t open) {
  check::Random random(100 * history_size + open);
  Ring ring(history_size, open);
  std::deque<Pair> kept;
  for (std::int64_t round = 0; round < 3 * history_size + 3; ++round) {
    const Vector g = random_vector(random), p = ring.direction(g);
    const Vector expected = times(inverse_hessian(kept), g);
    const double size = std::sqrt(dot(expected, expected));
    for (int k = 0; k < kDim; ++k) CHECK_NEAR(p[k] / size, -expected[k] / size, 1e-7);
    CHECK(dot(p, g) < 0);
    CHECK_EQUAL(ring.scalars().count(), kept.size());

    const double t = 0.1 + 2 * random.uniform();
    Vector s = p;
    for (double& x : s) x *= t;
    const Vector y = curvature_of(s);
    CHECK(ring.offer(p, g, y, t));
    kept.push_back({s, y});
    if (static_cast<std::int64_t>(kept.size()) > history_size) {
      const std::int64_t dropped = history_size / 2 > 1 ? history_size / 2 : 1;
      kept.erase(kept.begin(), kept.begin() + dropped);
    }
  }
}

// After a direction that was scaled the recursion is two_loop's, to the bit.
void check_scaled() {
  check::Random random(3);
  Ring ring(5, 2);
  for (int round = 0; round < 4; ++round) {
    const Vector g = random_vector(random), p = ring.direction(g, round == 3);
    CHECK(ring.offer(p, g, curvature_of(p), 1.0));
  }
  const Vector g = random_vector(random), p = ring.direction(g);
  CHECK_EQUAL(ring.broyden().held(), 0);
  const LbfgsScalars state = ring.scalars();
  const Vector before(state.array(kCoefS), state.array(kCoefG) + 1);
  two_loop(state);
  CHECK(before == Vector(state.array(kCoefS), state.array(kCoefG) + 1));
  CHECK(dot(p, g) < 0);
}

// The arrays lie behind the header, one after another, without overlap.
void check_layout() {
  for (std::int64_t slots = 2; slots < 20; ++slots) {
    std::int64_t end = kBroydenHeader;
    for (int i = 0; i < kBroydenArrays; ++i) {
      const auto array = static_cast<BroydenArray>(i);
      CHECK_EQUAL(broyden_offset(array, slots), end);
      end += broyden_array_size(array, slots);
    }
    CHECK_EQUAL(end, 16 + 18 * slots + 5 * slots * slots);
  }
}

}  // namespace

int main() {
  check_layout();
  check_scaled();
  for (const std::int64_t history_size : {1, 2, 3, 7, 10}) {
    for (std::int64_t open = 0; open <= history_size; ++open) {
      check::context =
          "history_size " + std::to_string(history_size) + ", first slot " + std::to_string(open);
      check_ring(history_size, open);
    }
  }
  return check::result();
}
