// Every kernel of every level that runs here, on integers for which all arithmetic is exact: at
// sizes around those of vectors, runs and blocks, on parts of the flat range, on all formats,
// with segments and gaps, between guard zones.
#include "cpu/kernels.h"

#include <algorithm>

#include "buffers.h"
#include "levels.h"

using namespace fuse_ext;
using check::Buffer;
using check::dtype_of;
using check::Tensors;
using Vector = std::vector<double>;

namespace {

// A part of the flat range, and the state of one call.
struct Range {
  std::int64_t numel, begin, end;
};

template <class Visit>
void for_flat(const Range& range, Visit&& visit) {
  for (std::int64_t i = range.begin; i < range.end; ++i) visit(static_cast<std::size_t>(i));
}

Vector magnitudes(const Vector& values) {
  Vector out = values;
  for (double& value : out) value = std::fabs(value);
  return out;
}

double sum_of_products(const Range& range, const Vector& a, const Vector& b) {
  double sum = 0;
  for_flat(range, [&](std::size_t i) { sum += a[i] * b[i]; });
  return sum;
}

double largest(const Range& range, const Vector& values) {
  double most = 0;
  for_flat(range, [&](std::size_t i) { most = std::max(most, std::fabs(values[i])); });
  return most;
}

// With much to do besides Adam itself, from the other end of the average, and plain (is_plain).
constexpr AdamOptions kAdamOptions[] = {
    {3, 0.1, 0.9, 0.99, 1e-3, 0, 0.1, false, true, 1.0},
    {3, 0.1, 0.4, 0.999, 1e-3, 0.5, 0, false, false, 1.0},
    {3, 0.1, 0.9, 0.999, 1e-3, 0, 0.1, true, false, 1.0},
};

Row row_of(Buffer& buffer, DType dtype) { return {buffer.data(), nullptr, dtype}; }

template <class T>
class Kernels {
 public:
  Kernels(const StateKernels<T>& kernels, std::uint64_t seed) : k_(kernels), random_(seed) {}

  void check_all(const Range& range, DType row_dtype) {
    for (const int pieces : {1, 9}) {
      Tensors tensors(random_, range.numel, pieces, pieces > 1, sizeof(T) == sizeof(double));
      for (const bool amsgrad : {false, true}) {
        for (const AdamOptions& options : kAdamOptions)
          check_adam(tensors, range, amsgrad, options);
      }
      for (const double sign : {1.0, -1.0}) {
        check_grad_stats(tensors, range, row_dtype, sign);
        const std::int64_t rows = random_.below(10);
        check_dots(tensors, range, row_dtype, sign, rows, false);
        check_dots(tensors, range, row_dtype, sign, rows, true);
        for (const PastCaches past : check::kPastCaches) {
          check_combine(tensors, range, row_dtype, sign, rows, 0, past);
          check_combine(tensors, range, row_dtype, sign, rows, 0.5, past);
        }
      }
      check_copies(tensors, range);
      for (const PastCaches past : check::kPastCaches) {
        check_move(tensors, range, row_dtype, 0.5, true, past);
        check_move(tensors, range, row_dtype, -2, false, past);
        check_move(tensors, range, row_dtype, 0, true, past);
        check_move(tensors, range, row_dtype, 0, false, past);
      }
      check_blend(tensors, range, row_dtype);
    }
  }

 private:
  // A flat vector of the state's type, or a row, with its values.
  struct Flat {
    Flat(check::Random& random, DType dtype, std::int64_t numel)
        : values(check::integers(random, numel)), buffer(dtype, numel) {
      buffer.fill(values);
    }
    void expect(const char* name) const { buffer.expect(name, values); }

    Vector values;
    Buffer buffer;
  };

  Flat state(const Range& range) { return Flat(random_, dtype_of<T>(), range.numel); }

  // The step itself is compared with adam_element: equal bits at every level.
  void check_adam(Tensors& tensors, const Range& range, bool amsgrad, const AdamOptions& options) {
    const AdamCoefficients<T> c = adam_coefficients<T>(options);
    Flat m = state(range), v = state(range), v_max = state(range);
    v.buffer.fill(v.values = magnitudes(v.values));
    Vector params = tensors.x;
    double sum = 0;
    for_flat(range, [&](std::size_t i) {
      if (tensors.covered[i] == 0) return;
      T x = static_cast<T>(tensors.x[i]), mi = static_cast<T>(m.values[i]);
      T vi = static_cast<T>(v.values[i]), vi_max = static_cast<T>(v_max.values[i]);
      const T grad = static_cast<T>(tensors.grad[i]);
      if (amsgrad) {
        adam_element<T, true>(x, grad, mi, vi, &vi_max, c);
      } else {
        adam_element<T, false>(x, grad, mi, vi, nullptr, c);
      }
      params[i] = x, m.values[i] = mi, v.values[i] = vi, v_max.values[i] = vi_max;
      sum += tensors.grad[i] * tensors.grad[i];
    });
    Buffer out(DType::f64, 1);
    k_.adam(tensors.table(), range.begin, range.end, m.buffer.template as<T>(),
            v.buffer.template as<T>(), amsgrad ? v_max.buffer.template as<T>() : nullptr, c,
            out.as<double>());
    out.expect("sum of squares", {sum});
    m.expect("exp_avg");
    v.expect("exp_avg_sq");
    v_max.expect("max_exp_avg_sq");
    tensors.expect_params(params);
    tensors.expect_grads(tensors.grad);
    reset_params(tensors);
  }

  void check_grad_stats(Tensors& tensors, const Range& range, DType row_dtype, double sign) {
    const Vector g = tensors.effective(sign);
    Flat row(random_, row_dtype, range.numel);
    const Row direction_row = row_of(row.buffer, row_dtype);
    const Vector ones(g.size(), 1.0);
    Vector pull = tensors.decay;
    for (std::size_t i = 0; i < pull.size(); ++i) pull[i] *= 0.5 * tensors.x[i];
    for (const bool direction : {false, true}) {
      Buffer out(DType::f64, kGradStats);
      k_.grad_stats(tensors.table(), range.begin, range.end, static_cast<T>(sign),
                    direction ? &direction_row : nullptr, out.as<double>());
      Vector expected(kGradStats);
      expected[kGradDotDirection] = direction ? sum_of_products(range, g, row.values) : 0;
      expected[kGradSq] = sum_of_products(range, g, g);
      expected[kGradAbsSum] = sum_of_products(range, magnitudes(g), ones);
      expected[kPenalty] = sum_of_products(range, pull, tensors.x);
      expected[kGradAbsMax] = largest(range, g);
      out.expect("grad_stats", expected);
    }
    row.expect("direction");
    Buffer out(DType::f64, 1);
    k_.largest_param(tensors.table(), range.begin, range.end, out.as<double>());
    out.expect("largest_param", Vector{largest(range, tensors.x)});
    tensors.expect_params(tensors.x);
  }

  // Rows and their pointers.
  struct RowList {
    // Half of the lists as if they came from the memory.
    RowList(check::Random& random, DType dtype, std::int64_t numel, std::int64_t count)
        : ahead(random.below(2) == 0 ? 0 : 1024) {
      for (std::int64_t r = 0; r < count; ++r) {
        flats.push_back(std::make_unique<Flat>(random, dtype, numel));
        add(row_of(flats.back()->buffer, dtype));
      }
    }

    void add(const Row& row) {
      list.push_back(row);
      rows = {list.data(), static_cast<std::int64_t>(list.size()), ahead};
    }

    std::vector<std::unique_ptr<Flat>> flats;
    std::vector<Row> list;
    Rows rows{nullptr, 0};
    std::int64_t ahead;
  };

  void check_dots(Tensors& tensors, const Range& range, DType row_dtype, double sign,
                  std::int64_t count, bool form_pair) {
    const Vector g = tensors.effective(sign);
    RowList list(random_, row_dtype, range.numel, count);
    Flat previous = state(range), y(random_, row_dtype, range.numel);
    const Row y_row = row_of(y.buffer, row_dtype);
    if (form_pair) list.add(y_row);
    // Where the formats agree, the previous gradient may lie in y's own row.
    const bool shared = row_dtype == dtype_of<T>() && random_.below(2) == 0;
    const Vector& before = shared ? y.values : previous.values;
    Vector difference = y.values;
    if (form_pair) for_flat(range, [&](std::size_t i) { difference[i] = g[i] - before[i]; });
    std::vector<const Vector*> rows;
    for (const auto& flat : list.flats) rows.push_back(&flat->values);
    if (form_pair) rows.push_back(&difference);
    Vector expected;
    for (const Vector* row : rows) expected.push_back(sum_of_products(range, g, *row));
    for (const Vector* row : rows) {
      expected.push_back(form_pair ? sum_of_products(range, difference, *row) : 0.0);
    }
    Buffer out(DType::f64, static_cast<std::int64_t>(expected.size()));
    k_.dots(tensors.table(), range.begin, range.end, static_cast<T>(sign),
            (shared ? y : previous).buffer.template as<T>(), form_pair ? &y_row : nullptr,
            list.rows, out.as<double>());
    out.expect("dots", expected);
    y.buffer.expect("y", difference);
    previous.expect("grad_prev");
    for (const auto& flat : list.flats) flat->expect("row");
  }

  void check_combine(Tensors& tensors, const Range& range, DType row_dtype, double sign,
                     std::int64_t count, double step, PastCaches past) {
    const Vector g = tensors.effective(sign);
    const RowList list(random_, row_dtype, range.numel, count);
    const Vector coefs = check::integers(random_, count);
    Flat p(random_, row_dtype, range.numel), previous = state(range), origin = state(range);
    const bool moves = step != 0;
    for_flat(range, [&](std::size_t i) {
      double sum = -2 * g[i];
      for (std::size_t r = 0; r < list.flats.size(); ++r) {
        sum += coefs[r] * list.flats[r]->values[i];
      }
      p.values[i] = sum * tensors.share[i];
      previous.values[i] = g[i];
      if (!moves || tensors.covered[i] == 0) return;
      origin.values[i] = tensors.x[i];
      tensors.x[i] += step * p.values[i];
    });
    Buffer out(DType::f64, kDirectionStats);
    k_.combine(tensors.table(), range.begin, range.end, static_cast<T>(sign), list.rows,
               coefs.data(), -2, row_of(p.buffer, row_dtype), previous.buffer.template as<T>(),
               moves ? origin.buffer.template as<T>() : nullptr, step, past, out.as<double>());
    Vector expected(kDirectionStats);
    expected[kDotGrad] = sum_of_products(range, g, p.values);
    expected[kSq] = sum_of_products(range, p.values, p.values);
    expected[kMax] = largest(range, p.values);
    out.expect("combine", expected);
    p.expect("p");
    previous.expect("grad_prev");
    origin.expect("origin");
    for (const auto& flat : list.flats) flat->expect("row");
    tensors.expect_params(tensors.x);
    reset_params(tensors);
  }

  void check_move(Tensors& tensors, const Range& range, DType row_dtype, double step, bool save,
                  PastCaches past) {
    Flat origin = state(range);
    Flat row(random_, row_dtype, range.numel);
    for_flat(range, [&](std::size_t i) {
      if (tensors.covered[i] == 0) return;
      if (save) origin.values[i] = tensors.x[i];
      tensors.x[i] = origin.values[i] + step * row.values[i];
    });
    k_.move(tensors.table(), range.begin, range.end, origin.buffer.template as<T>(),
            row_of(row.buffer, row_dtype), step, save, past);
    origin.expect("origin");
    row.expect("row");
    tensors.expect_params(tensors.x);
    reset_params(tensors);
  }

  void check_blend(Tensors& tensors, const Range& range, DType row_dtype) {
    Flat origin = state(range), row(random_, row_dtype, range.numel);
    double square = 0;
    for_flat(range, [&](std::size_t i) {
      const double direction = row.values[i];
      row.values[i] = 0;  // what no segment covers does not move
      if (tensors.covered[i] == 0) return;
      tensors.x[i] = 0.5 * tensors.x[i] + 0.5 * (origin.values[i] + 2 * direction);
      row.values[i] = tensors.x[i] - origin.values[i];
      square += row.values[i] * row.values[i];
    });
    Buffer out(DType::f64, 1);
    k_.blend(tensors.table(), range.begin, range.end, origin.buffer.template as<T>(),
             row_of(row.buffer, row_dtype), 0.5, 2, out.as<double>());
    out.expect("square", {square});
    origin.expect("origin");
    row.expect("row");
    tensors.expect_params(tensors.x);
    reset_params(tensors);
  }

  void check_copies(Tensors& tensors, const Range& range) {
    Flat flat = state(range);
    for_flat(range, [&](std::size_t i) {
      if (tensors.covered[i] != 0) flat.values[i] = tensors.grad[i];
    });
    k_.gather(tensors.table(), range.begin, range.end, flat.buffer.template as<T>());
    flat.expect("gathered");
    Flat source = state(range);
    for_flat(range, [&](std::size_t i) {
      if (tensors.covered[i] != 0) tensors.grad[i] = source.values[i];
    });
    k_.scatter(tensors.table(), range.begin, range.end, source.buffer.template as<T>());
    source.expect("source");
    tensors.expect_grads(tensors.grad);
  }

  // Small integers again, after a step that made fractions.
  void reset_params(Tensors& tensors) {
    tensors.set_params(check::integers(random_, static_cast<std::int64_t>(tensors.x.size())));
  }

  const StateKernels<T>& k_;
  check::Random random_;
};

// Sums over a long range keep what is small: beside 1,024 times 2^12, whose sum is exact, 2^-10
// must not be lost, as it would be in one float32 accumulator. Longer runs (kRun) would fail here.
void check_long_sums(const StateKernels<float>& k) {
  const std::int64_t numel = 50001;
  Buffer grad(DType::f32, numel), param(DType::f32, numel), row(DType::f32, numel);
  Buffer zero(DType::f32, numel), y(DType::f32, numel), m(DType::f32, numel);
  Vector values(static_cast<std::size_t>(numel));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = i / 1024 % 4 == 0 ? 64 : 0.03125;
  for (Buffer* buffer : {&grad, &param, &row}) buffer->fill(values);
  for (Buffer* buffer : {&zero, &m}) buffer->fill(Vector(values.size(), 0.0));
  const Range range{numel, 0, numel};
  const double square = sum_of_products(range, values, values);
  const Segment segment{param.data(), grad.data(), 0, numel, 0, 1, DType::f32, DType::f32};
  const SegmentTable table{&segment, 1};
  Vector out(8);

  const Row only = row_of(row, DType::f32), y_row = row_of(y, DType::f32);
  const Row five[] = {only, only, only, only, y_row};
  const Rows rows{five, 5};
  Vector sums(10);
  k.dots(table, 0, numel, 1, zero.as<float>(), &y_row, rows, sums.data());
  for (const double sum : sums) CHECK_EQUAL(sum, square);

  k.grad_stats(table, 0, numel, 1, &only, out.data());
  CHECK_EQUAL(out[kGradDotDirection], square);
  CHECK_EQUAL(out[kGradSq], square);

  k.combine(table, 0, numel, 1, {five, 0}, nullptr, 1, y_row, zero.as<float>(), nullptr, 0,
            PastCaches::nothing, out.data());
  CHECK_EQUAL(out[kDotGrad], square);
  CHECK_EQUAL(out[kSq], square);

  k.blend(table, 0, numel, m.as<float>(), only, 1, 0, out.data());
  CHECK_EQUAL(out[0], square);

  const AdamOptions options{1, 0, 0.9, 0.99, 1e-8, 0, 0, false, false, 1};
  k.adam(table, 0, numel, m.as<float>(), y.as<float>(), nullptr, adam_coefficients<float>(options),
         out.data());
  CHECK_EQUAL(out[0], square);
}

// Moments in bfloat16: the bits of adam_element and store_moments at every level.
void check_adam_bf16(const CpuKernels& level, const Range& range, int pieces, bool amsgrad,
                     const AdamOptions& options) {
  check::Random random(static_cast<std::uint64_t>(range.numel));
  Tensors tensors(random, range.numel, pieces, pieces > 1, false);
  const AdamCoefficients<float> c = adam_coefficients<float>(options);
  const RandomKey key = random_key(options.step);
  Vector values[3] = {check::integers(random, range.numel), {}, {}};
  values[1] = values[2] = magnitudes(values[0]);
  std::vector<Buffer> moments;
  for (const Vector& of : values) moments.emplace_back(DType::bf16, range.numel).fill(of);
  Vector params = tensors.x;
  for_flat(range, [&](std::size_t i) {
    if (tensors.covered[i] == 0) return;
    auto x = static_cast<float>(tensors.x[i]), m = static_cast<float>(values[0][i]);
    auto v = static_cast<float>(values[1][i]), v_max = static_cast<float>(values[2][i]);
    const auto grad = static_cast<float>(tensors.grad[i]);
    BFloat16 kept[3];
    if (amsgrad) {
      adam_element<float, true>(x, grad, m, v, &v_max, c);
    } else {
      adam_element<float, false>(x, grad, m, v, nullptr, c);
    }
    const std::uint32_t bits = random_bits(static_cast<std::uint32_t>(i), key);
    store_moments<true>(&kept[0], &kept[1], &kept[2], m, v, v_max, bits);
    params[i] = x;
    for (int k = 0; k < 3; ++k) values[k][i] = load<double>(kept[k]);
  });
  Buffer out(DType::f64, 1);
  level.adam_bf16(tensors.table(), range.begin, range.end, moments[0].as<BFloat16>(),
                  moments[1].as<BFloat16>(), amsgrad ? moments[2].as<BFloat16>() : nullptr, c, key,
                  out.as<double>());
  for (std::size_t k = 0; k < 3; ++k) moments[k].expect("a moment", values[k]);
  tensors.expect_params(params);
  tensors.expect_grads(tensors.grad);
  out.expect_zones("out");
}

}  // namespace

int main() {
  for (const CpuKernels* level : check::runnable_levels()) {
    check::context = level->level;
    check_long_sums(level->f32);
    for (const DType row : check::kDTypes) {
      for (const std::int64_t numel : {1,  2,  3,   7,   8,    9,    15,   16,   17,   31,  33,
                                       63, 65, 127, 129, 1023, 1024, 1025, 4095, 4097, 8193}) {
        // The whole range, an empty one, and a part that begins and ends off any boundary.
        for (const Range& range : {Range{numel, 0, numel}, Range{numel, numel / 2, numel / 2},
                                   Range{numel, numel / 3, numel - numel / 4}}) {
          check::context = std::string(level->level) + ", rows " + check::name_of(row) + ", [" +
                           std::to_string(range.begin) + ", " + std::to_string(range.end) +
                           ") of " + std::to_string(numel);
          Kernels<float>(level->f32, static_cast<std::uint64_t>(numel)).check_all(range, row);
          Kernels<double>(level->f64, static_cast<std::uint64_t>(numel)).check_all(range, row);
          if (row != DType::bf16) continue;  // once
          for (const int pieces : {1, 9}) {
            for (const bool amsgrad : {false, true}) {
              for (const AdamOptions& options : kAdamOptions) {
                check_adam_bf16(*level, range, pieces, amsgrad, options);
              }
            }
          }
        }
      }
    }
  }
  return check::result();
}
