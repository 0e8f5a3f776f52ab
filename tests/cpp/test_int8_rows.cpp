// Rows in 8 bits, at every level that runs here: what is stored is the nearest whole number of
// scales, sums are those of the stored values, and nothing is touched outside of the rows.
#include <algorithm>

#include "buffers.h"
#include "cpu/kernels.h"
#include "levels.h"

using namespace fuse_ext;
using check::Buffer;
using check::dtype_of;
using Vector = std::vector<double>;

namespace {

struct Int8Row {
  Int8Row(check::Random& random, std::int64_t numel)
      : values(DType::i8, numel), scales(DType::f32, (numel + kScaleBlock - 1) / kScaleBlock) {
    for (std::int64_t i = 0; i < numel; ++i) {
      values.set(i, static_cast<double>(random.below(255)) - 127);
    }
    for (std::int64_t b = 0; b < scales.numel(); ++b) scales.set(b, 0.01 + random.uniform());
  }

  Row row() { return {values.data(), scales.as<float>(), DType::i8}; }
  double scale(std::int64_t i) const { return scales.get(i / kScaleBlock); }

  Vector read() const {
    Vector out;
    for (std::int64_t i = 0; i < values.numel(); ++i) out.push_back(values.get(i) * scale(i));
    return out;
  }

  // The row holds `exact`, each within half a scale and the rounding of both; the largest of
  // each block is stored as +-127.
  void expect(const char* name, const Vector& exact, double roundoff) const {
    for (std::int64_t i = 0; i < values.numel(); ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double error = 0.5 * scale(i) * (1 + 1000 * roundoff);
      CHECK_NEAR(values.get(i) * scale(i), exact[at], error);
      CHECK(std::fabs(values.get(i)) <= 127);
    }
    for (std::int64_t b = 0; b < scales.numel(); ++b) {
      double largest = 0, stored = 0;
      const std::int64_t stop = std::min(values.numel(), (b + 1) * kScaleBlock);
      for (std::int64_t i = b * kScaleBlock; i < stop; ++i) {
        largest = std::max(largest, std::fabs(exact[static_cast<std::size_t>(i)]));
        stored = std::max(stored, std::fabs(values.get(i)));
      }
      CHECK_NEAR(scales.get(b), largest / 127, largest * 8 * roundoff);
      CHECK_EQUAL(stored, largest > 0 ? 127 : 0);
    }
    values.expect_zones(name);
    scales.expect_zones(name);
  }

  Buffer values, scales;
};

template <class T>
class Int8Kernels {
 public:
  Int8Kernels(const StateKernels<T>& kernels, std::int64_t numel)
      : k_(kernels),
        numel_(numel),
        random_(static_cast<std::uint64_t>(numel)),
        grad_(dtype_of<T>(), numel),
        previous_(dtype_of<T>(), numel),
        param_(dtype_of<T>(), numel),
        origin_(dtype_of<T>(), numel) {
    for (Buffer* buffer : {&grad_, &previous_, &param_, &origin_}) {
      for (std::int64_t i = 0; i < numel; ++i) buffer->set(i, random_.normal());
    }
    // A block of zeros among the others.
    for (std::int64_t i = kScaleBlock; i < std::min(numel, 2 * kScaleBlock); ++i) {
      grad_.set(i, 0), previous_.set(i, 0);
    }
    segment_ = {param_.data(), grad_.data(), 0, numel, 0, 1, dtype_of<T>(), dtype_of<T>()};
    for (int r = 0; r < 5; ++r) {
      rows_.push_back(std::make_unique<Int8Row>(random_, numel));
      list_.push_back(rows_.back()->row());
    }
  }

  void check_all() {
    check_dots();
    for (const PastCaches past : check::kPastCaches) check_combine(past), check_move(past);
    check_blend();
    for (const Buffer* buffer : {&grad_, &previous_, &param_, &origin_}) {
      buffer->expect_zones("a flat vector");
    }
    for (const auto& row : rows_) row->values.expect_zones("a row"), row->scales.expect_zones("");
  }

 private:
  // Rows from a cache, or as if from the memory.
  std::int64_t ahead() { return random_.below(2) == 0 ? 0 : 1024; }

  void check_dots() {
    Int8Row y(random_, numel_);
    const Row y_row = y.row();
    Vector difference, g;
    for (std::int64_t i = 0; i < numel_; ++i) {
      g.push_back(grad_.get(i));
      difference.push_back(grad_.get(i) - previous_.get(i));
    }
    std::vector<Row> rows = list_;
    rows.push_back(y_row);
    Buffer out(DType::f64, 12);
    k_.dots(table(), 0, numel_, 1, previous_.as<T>(), &y_row, {rows.data(), 6, ahead()},
            out.as<double>());
    y.expect("y", difference, kRoundoff);
    const Vector stored = y.read();
    for (std::size_t r = 0; r < 5; ++r) {
      expect_sum(out.get(static_cast<std::int64_t>(r)), g, rows_[r]->read());
      expect_sum(out.get(static_cast<std::int64_t>(6 + r)), stored, rows_[r]->read());
    }
    expect_sum(out.get(5), g, stored);
    expect_sum(out.get(11), stored, stored);
    out.expect_zones("dots");
  }

  void check_combine(PastCaches past) {
    Int8Row p(random_, numel_);
    const double coefs[] = {0.5, -1.5, 1, 0.25, -2};
    Vector exact, g;
    for (std::int64_t i = 0; i < numel_; ++i) g.push_back(grad_.get(i)), exact.push_back(-g.back());
    for (std::size_t r = 0; r < 5; ++r) {
      const Vector row = rows_[r]->read();
      for (std::size_t i = 0; i < exact.size(); ++i) exact[i] += coefs[r] * row[i];
    }
    Buffer out(DType::f64, kDirectionStats), previous(dtype_of<T>(), numel_);
    k_.combine(table(), 0, numel_, 1, {list_.data(), 5, ahead()}, coefs, -1, p.row(),
               previous.as<T>(), nullptr, 0, past, out.as<double>());
    p.expect("p", exact, kRoundoff);
    const Vector stored = p.read();
    expect_sum(out.get(kDotGrad), g, stored);
    expect_sum(out.get(kSq), stored, stored);
    previous.expect("grad_prev", g);
    out.expect_zones("combine");
  }

  void check_move(PastCaches past) {
    const Vector p = rows_[0]->read();
    k_.move(table(), 0, numel_, origin_.as<T>(), list_[0], 0.5, false, past);
    for (std::int64_t i = 0; i < numel_; ++i) {
      const double exact = origin_.get(i) + 0.5 * p[static_cast<std::size_t>(i)];
      CHECK_NEAR(param_.get(i), exact, 200 * kRoundoff);
    }
  }

  void check_blend() {
    Int8Row row(random_, numel_);
    Vector taken;
    const Vector p = row.read();
    for (std::int64_t i = 0; i < numel_; ++i) {
      const double goal = origin_.get(i) + 0.5 * p[static_cast<std::size_t>(i)];
      taken.push_back(0.25 * param_.get(i) + 0.75 * goal - origin_.get(i));
    }
    Buffer out(DType::f64, 1);
    k_.blend(table(), 0, numel_, origin_.as<T>(), row.row(), 0.25, 0.5, out.as<double>());
    row.expect("step taken", taken, kRoundoff);
    expect_sum(out.get(0), row.read(), row.read());
  }

  SegmentTable table() const { return {&segment_, 1}; }
  // Scales are float32 whatever the state is.
  static constexpr double kRoundoff = 0x1p-24;

  // A sum of up to 1,024 terms in T, then in double.
  void expect_sum(double actual, const Vector& a, const Vector& b) {
    long double sum = 0, size = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      const long double term = static_cast<long double>(a[i]) * b[i];
      sum += term, size += std::fabs(term);
    }
    const double u = sizeof(T) == sizeof(float) ? 0x1p-24 : 0x1p-53;
    CHECK_NEAR(actual, static_cast<double>(sum), static_cast<double>(size) * 32 * u);
  }

  const StateKernels<T>& k_;
  std::int64_t numel_;
  check::Random random_;
  Buffer grad_, previous_, param_, origin_;
  Segment segment_;
  std::vector<std::unique_ptr<Int8Row>> rows_;
  std::vector<Row> list_;
};

// A number that is not finite spoils its block and no other.
template <class T>
void check_not_finite(const StateKernels<T>& k) {
  const std::int64_t numel = 4 * kScaleBlock - 5;
  for (const double value : {std::nan(""), static_cast<double>(INFINITY)}) {
    for (const std::int64_t where : {std::int64_t{0}, kScaleBlock + 7, numel - 1}) {
      check::Random random(1);
      Buffer grad(dtype_of<T>(), numel), previous(dtype_of<T>(), numel);
      for (std::int64_t i = 0; i < numel; ++i)
        grad.set(i, 1 + random.uniform()), previous.set(i, 0);
      grad.set(where, value);
      const Segment segment{grad.data(), grad.data(), 0, numel, 0, 1, dtype_of<T>(), dtype_of<T>()};
      Int8Row y(random, numel);
      const Row y_row = y.row();
      double out[2];
      k.dots({&segment, 1}, 0, numel, 1, previous.as<T>(), &y_row, {&y_row, 1}, out);
      CHECK(!std::isfinite(out[0]) && !std::isfinite(out[1]));
      const Vector stored = y.read();
      for (std::int64_t i = 0; i < numel; ++i) {
        const bool same_block = i / kScaleBlock == where / kScaleBlock;
        CHECK(std::isfinite(stored[static_cast<std::size_t>(i)]) != same_block);
      }
    }
  }
}

}  // namespace

int main() {
  for (const CpuKernels* level : check::runnable_levels()) {
    for (const std::int64_t numel :
         {1, 2, 17, 127, 128, 129, 255, 256, 1000, 1025, 4095, 4096, 4097, 9001}) {
      check::context = std::string(level->level) + ", " + std::to_string(numel) + " elements";
      Int8Kernels<float>(level->f32, numel).check_all();
      Int8Kernels<double>(level->f64, numel).check_all();
    }
    check::context = level->level;
    check_not_finite<float>(level->f32);
    check_not_finite<double>(level->f64);
  }
  return check::result();
}
