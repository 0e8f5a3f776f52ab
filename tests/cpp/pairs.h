// Curvature pairs as vectors, and the vectors that belong to a ring of scalars: what the tests of
// the recursions on scalars share.
#pragma once

#include <vector>

#include "check.h"
#include "two_loop.h"

namespace pairs {

constexpr int kDim = 12;
using Vector = std::vector<double>;
using Matrix = std::vector<Vector>;

struct Pair {
  Vector s, y;
};

inline double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (int i = 0; i < kDim; ++i) sum += a[i] * b[i];
  return sum;
}

inline Vector random_vector(check::Random& random) {
  Vector v(kDim);
  for (double& x : v) x = random.normal();
  return v;
}

// y = A s with A = diagonal + two rank-one terms: positive definite and not diagonal.
inline Vector curvature_of(const Vector& s) {
  Vector y(kDim);
  double sum = 0, weighted = 0;
  for (int i = 0; i < kDim; ++i) sum += s[i], weighted += s[i] * (i - 4.0);
  for (int i = 0; i < kDim; ++i) y[i] = (1.0 + i) * s[i] + 0.5 * sum + 0.1 * weighted * (i - 4.0);
  return y;
}

// A ring's scalars and its rows; what passes over vectors would leave is put in here.
class Rows {
 public:
  Rows(std::int64_t history_size, std::int64_t open)
      : slots_(history_size + 1),
        data_(static_cast<std::size_t>(fuse_ext::scalar_offset(fuse_ext::kScalarArrays, slots_)),
              0.0),
        rows_(static_cast<std::size_t>(slots_), Pair{Vector(kDim, 0.0), Vector(kDim, 0.0)}) {
    data_[fuse_ext::kOpen] = static_cast<double>(open);
  }

  fuse_ext::LbfgsScalars scalars() { return {data_.data(), slots_}; }
  std::int64_t slots() const { return slots_; }
  const Pair& at(std::int64_t slot) const { return rows_[static_cast<std::size_t>(slot)]; }

  // Row and y of the open slot, and their dots.
  void open_pair(const Vector& row, const Vector& y) {
    const fuse_ext::LbfgsScalars state = scalars();
    rows_[static_cast<std::size_t>(state.open())] = {row, y};
    for (std::int64_t i = 0; i < slots_; ++i) {
      state.array(fuse_ext::kYS)[i] = dot(y, at(i).s);
      state.array(fuse_ext::kYY)[i] = dot(y, at(i).y);
    }
    state[fuse_ext::kYDotY] = dot(y, y);
    state[fuse_ext::kDirectionSq] = dot(row, row);
  }

  void note_gradient(const Vector& g, std::int64_t slot) {
    scalars().array(fuse_ext::kGradS)[slot] = dot(g, at(slot).s);
    scalars().array(fuse_ext::kGradY)[slot] = dot(g, at(slot).y);
  }

  // The direction from its coefficients.
  Vector combine(const Vector& g) {
    const fuse_ext::LbfgsScalars state = scalars();
    Vector p(kDim);
    for (int k = 0; k < kDim; ++k) p[k] = *state.array(fuse_ext::kCoefG) * g[k];
    for (std::int64_t age = 0; age < state.count(); ++age) {
      const std::int64_t i = state.slot(age);
      for (int k = 0; k < kDim; ++k) {
        p[k] += state.array(fuse_ext::kCoefS)[i] * at(i).s[k] +
                state.array(fuse_ext::kCoefY)[i] * at(i).y[k];
      }
    }
    return p;
  }

 private:
  std::int64_t slots_;
  Vector data_;
  std::vector<Pair> rows_;
};

}  // namespace pairs
