// The recursion on scalars against the inverse Hessian as a dense matrix (BFGS from gamma I), at
// every ring index and count.
#include "two_loop.h"

#include <deque>
#include <limits>
#include <vector>

#include "check.h"
#include "pairs.h"

using namespace fuse_ext;
using namespace pairs;

namespace {

Matrix product(const Matrix& a, const Matrix& b) {
  Matrix out(kDim, Vector(kDim, 0.0));
  for (int i = 0; i < kDim; ++i) {
    for (int j = 0; j < kDim; ++j) {
      for (int k = 0; k < kDim; ++k) out[i][j] += a[i][k] * b[k][j];
    }
  }
  return out;
}

// -H g, with H <- V' H V + rho s s', V = I - rho y s', over the pairs, oldest first.
Vector dense_direction(const std::deque<Pair>& pairs, const Vector& g) {
  Matrix h(kDim, Vector(kDim, 0.0));
  const double gamma =
      pairs.empty() ? 1.0
                    : dot(pairs.back().s, pairs.back().y) / dot(pairs.back().y, pairs.back().y);
  for (int i = 0; i < kDim; ++i) h[i][i] = gamma;
  for (const Pair& pair : pairs) {
    const double rho = 1 / dot(pair.s, pair.y);
    Matrix v(kDim, Vector(kDim)), v_transposed(kDim, Vector(kDim));
    for (int i = 0; i < kDim; ++i) {
      for (int j = 0; j < kDim; ++j) {
        v[i][j] = v_transposed[j][i] = (i == j) - rho * pair.y[i] * pair.s[j];
      }
    }
    h = product(v_transposed, product(h, v));
    for (int i = 0; i < kDim; ++i) {
      for (int j = 0; j < kDim; ++j) h[i][j] += rho * pair.s[i] * pair.s[j];
    }
  }
  Vector p(kDim, 0.0);
  for (int i = 0; i < kDim; ++i) {
    for (int j = 0; j < kDim; ++j) p[i] -= h[i][j] * g[j];
  }
  return p;
}

class Ring : public Rows {
 public:
  using Rows::Rows;

  bool offer(const Vector& row, const Vector& y, double step_length) {
    open_pair(row, y);
    return commit_pair(scalars(), step_length, 1e-8);
  }

  Vector direction(const Vector& g) {
    const LbfgsScalars state = scalars();
    // Slots outside of the ring must not be read, nor those of other sets.
    for (std::int64_t i = 0; i < slots(); ++i) {
      state.array(kGradS)[i] = state.array(kGradY)[i] = std::nan("");
    }
    for (std::int64_t age = 0; age < state.count(); ++age) {
      const std::int64_t i = state.slot(age);
      if (state.array(kPairSet)[i] == state[kSet]) note_gradient(g, i);
    }
    two_loop(state);
    return combine(g);
  }
};

void check_ring(std::int64_t history_size, std::int64_t open) {
  check::Random random(100 * history_size + open);
  Ring ring(history_size, open);
  std::deque<Pair> kept;
  for (std::int64_t round = 0; round < 2 * history_size + 3; ++round) {
    const Vector g = random_vector(random);
    const Vector p = ring.direction(g), expected = dense_direction(kept, g);
    for (int k = 0; k < kDim; ++k) CHECK_NEAR(p[k], expected[k], 1e-9);
    CHECK(dot(p, g) < 0);
    CHECK_EQUAL(ring.scalars().count(), kept.size());
    CHECK_EQUAL(ring.scalars().open(), (open + round) % (history_size + 1));

    const double step_length = 0.1 + 2 * random.uniform();
    const Vector row = random_vector(random);
    Vector s = row;
    for (double& x : s) x *= step_length;
    const Vector y = curvature_of(s);
    CHECK(ring.offer(row, y, step_length));
    kept.push_back({s, y});
    if (static_cast<std::int64_t>(kept.size()) > history_size) kept.pop_front();
    CHECK_NEAR(ring.scalars()[kGamma], dot(s, y) / dot(y, y), 1e-14);
  }
}

void check_refusals() {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  check::Random random(7);
  const Vector s = random_vector(random);
  Vector opposite = s, zero(kDim, 0.0), huge = s, bad = s;
  for (double& x : opposite) x = -x;
  for (double& x : huge) x *= 1e200;
  bad[3] = nan;
  struct Refused {
    Vector y;
    double step_length;
  };
  for (const Refused& offer :
       {Refused{opposite, 1.0}, Refused{s, -1.0}, Refused{s, 0.0}, Refused{zero, 1.0},
        Refused{bad, 1.0}, Refused{huge, 1.0}, Refused{s, nan}, Refused{s, inf}}) {
    Ring ring(2, 1);
    CHECK(ring.offer(s, curvature_of(s), 1.0));
    const Vector g = random_vector(random);
    const Vector before = ring.direction(g);
    CHECK(!ring.offer(s, offer.y, offer.step_length));
    CHECK_EQUAL(ring.scalars().count(), 1);
    CHECK_EQUAL(ring.scalars().open(), 2);
    CHECK_EQUAL(ring.scalars()[kAccepted], 1);
    CHECK_EQUAL(ring.scalars()[kSkipped], 1);
    const Vector after = ring.direction(g);
    for (int k = 0; k < kDim; ++k) CHECK_EQUAL(after[k], before[k]);
  }
}

struct Offer {
  Vector row, y;
  double step_length, slope;
  int set;

  void to(Ring& ring) const {
    ring.scalars()[kSet] = set;
    ring.scalars()[kDirectionDotGrad] = slope;
    CHECK(ring.offer(row, y, step_length));
  }
};

Offer random_offer(check::Random& random, int set) {
  const Vector row = random_vector(random);
  const double step_length = 0.1 + 2 * random.uniform();
  Vector s = row;
  for (double& x : s) x *= step_length;
  const Vector y = curvature_of(s);
  // s.B s = -t s.g is above and below s.y.
  return {row, y, step_length, -dot(s, y) * (0.5 + random.uniform()) / step_length, set};
}

// Coefficients of the pairs, newest first and S and Y alternating, and of g.
Vector coefficients(LbfgsScalars state) {
  Vector all;
  for (std::int64_t age = 0; age < state.count(); ++age) {
    all.push_back(state.array(kCoefS)[state.slot(age)]);
    all.push_back(state.array(kCoefY)[state.slot(age)]);
  }
  all.push_back(*state.array(kCoefG));
  return all;
}

// With pairs of several sets in the ring, those of each are used as if they were alone in one.
void check_sets(std::int64_t history_size, bool self_scaling) {
  constexpr int kSets = 3, kNone = 3;  // no pair is of the last
  check::Random random(history_size);
  Ring mixed(history_size, history_size / 2);
  mixed.scalars()[kSelfScaling] = self_scaling;
  std::deque<Offer> kept;
  for (int round = 0; round < 3 * history_size + 2; ++round) {
    const Vector g = random_vector(random);
    std::vector<Vector> first;
    for (int again = 0; again < 2; ++again) {
      for (int set = 0; set <= kNone; ++set) {
        Ring alone(history_size, 0);
        alone.scalars()[kSelfScaling] = self_scaling;
        Vector expected;
        for (const Offer& offer : kept) {
          if (offer.set == set) offer.to(alone);
        }
        alone.direction(g);
        const Vector theirs = coefficients(alone.scalars());
        std::size_t next = 0;
        for (std::size_t age = 0; age < kept.size(); ++age) {
          const bool used = kept[kept.size() - 1 - age].set == set;
          for (int side = 0; side < 2; ++side) expected.push_back(used ? theirs[next++] : 0.0);
        }
        expected.push_back(theirs[next]);

        const LbfgsScalars state = mixed.scalars();
        state[kSet] = set;
        CHECK_EQUAL(usable_pairs(state), alone.scalars().count());
        CHECK_EQUAL(usable_pairs(state, 1), alone.scalars().count() > 0);
        mixed.direction(g);
        CHECK_EQUAL(state[kUsable], alone.scalars().count());
        CHECK_EQUAL(state.count(), kept.size());
        const Vector ours = coefficients(state);
        for (std::size_t i = 0; i < ours.size(); ++i) CHECK_EQUAL(ours[i], expected[i]);
        if (set == kNone) CHECK_EQUAL(ours.back(), -1.0);
        if (again == 0) first.push_back(ours);
        CHECK(first[static_cast<std::size_t>(set)] == ours);
      }
    }
    kept.push_back(random_offer(random, static_cast<int>(random.below(kSets))));
    kept.back().to(mixed);
    if (static_cast<std::int64_t>(kept.size()) > history_size) kept.pop_front();
  }
}

// The arrays lie behind the header, one after another, without overlap.
void check_layout() {
  for (std::int64_t slots = 2; slots < 20; ++slots) {
    std::int64_t end = kHeaderSize;
    for (int i = 0; i < kScalarArrays; ++i) {
      const auto array = static_cast<ScalarArray>(i);
      CHECK_EQUAL(scalar_offset(array, slots), end);
      end += scalar_array_size(array, slots);
    }
    CHECK_EQUAL(scalar_offset(kScalarArrays, slots), end);
    CHECK_EQUAL(end, 16 + 9 * slots + 1 + 2 * slots * slots + 2 * slots);
    // What checkpoints from before pairs had sets hold is a prefix.
    CHECK_EQUAL(scalar_offset(kPairSet, slots), 16 + 9 * slots + 1 + 2 * slots * slots);
  }
}

}  // namespace

int main() {
  check_layout();
  check_refusals();
  for (const std::int64_t history_size : {1, 2, 3, 7, 10}) {
    for (std::int64_t open = 0; open <= history_size; ++open) {
      check::context =
          "history_size " + std::to_string(history_size) + ", first slot " + std::to_string(open);
      check_ring(history_size, open);
    }
    for (const bool self_scaling : {false, true}) check_sets(history_size, self_scaling);
  }
  return check::result();
}
