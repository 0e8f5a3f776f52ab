// bfloat16 and float16: every pattern, and rounding to nearest even by definition.
#include "numeric.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"

using namespace fuse_ext;

namespace {

// The value of a pattern by the definition of the format.
double value_of(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class Number>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int exponent = 8, mantissa = 7;
};
template <>
struct Format<Float16> {
  static constexpr int exponent = 5, mantissa = 10;
};

template <class Number>
double value_of(Number number) {
  return value_of(number.bits, Format<Number>::exponent, Format<Number>::mantissa);
}

bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

template <class Number>
std::uint16_t stored(float value) {
  Number number;
  store(&number, value);
  return number.bits;
}

template <class Number>
void check_loads() {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Number number{static_cast<std::uint16_t>(bits)};
    const double expected = value_of(number);
    CHECK(same(load<float>(number), expected));
    CHECK(same(load<double>(number), expected));
    // A number that is representable is stored as itself.
    if (!std::isnan(expected)) CHECK_EQUAL(stored<Number>(static_cast<float>(expected)), bits);
    CHECK(std::isnan(expected) ==
          std::isnan(value_of(Number{stored<Number>(static_cast<float>(expected))})));
  }
}

// Between neighbours a < b of a format, positive: below the middle to a, above it to b, the
// middle itself to the one whose last bit is 0. Past the largest number the next is infinity.
template <class Number>
void check_rounding() {
  const std::uint16_t infinity = ((1 << Format<Number>::exponent) - 1) << Format<Number>::mantissa;
  for (std::uint16_t low = 0; low < infinity; ++low) {
    const std::uint16_t high = low + 1;
    const double a = value_of(Number{low});
    const double step = high < infinity ? value_of(Number{high}) - a
                                        : a - value_of(Number{static_cast<std::uint16_t>(low - 1)});
    const float middle = static_cast<float>(a + step / 2);
    if (static_cast<double>(middle) != a + step / 2) continue;  // below float's own subnormals
    const float below = std::nextafterf(middle, 0.0f);
    const float above = std::nextafterf(middle, std::numeric_limits<float>::infinity());
    const std::uint16_t even = low % 2 == 0 ? low : high;
    CHECK_EQUAL(stored<Number>(middle), even);
    CHECK_EQUAL(stored<Number>(below), low);
    CHECK_EQUAL(stored<Number>(above), high);
    CHECK_EQUAL(stored<Number>(-middle), even | 0x8000u);
    CHECK_EQUAL(stored<Number>(-below), low | 0x8000u);
    CHECK_EQUAL(stored<Number>(-above), high | 0x8000u);
  }
  const float inf = std::numeric_limits<float>::infinity();
  CHECK_EQUAL(stored<Number>(inf), infinity);
  CHECK_EQUAL(stored<Number>(-inf), infinity | 0x8000u);
  CHECK_EQUAL(stored<Number>(1e38f * 3.4f), infinity);
  CHECK_EQUAL(stored<Number>(std::numeric_limits<float>::denorm_min()), 0);
  CHECK_EQUAL(stored<Number>(-std::numeric_limits<float>::denorm_min()), 0x8000u);
  for (const std::uint32_t nan :
       {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    CHECK(std::isnan(value_of(Number{stored<Number>(bits_float(nan))})));
  }
  // Doubles go by way of float, as in torch.
  check::Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const double value = std::ldexp(random.normal(), static_cast<int>(random.below(60)) - 30);
    Number number;
    store(&number, value);
    CHECK_EQUAL(number.bits, stored<Number>(static_cast<float>(value)));
  }
}

}  // namespace

int main() {
  check_loads<BFloat16>();
  check_loads<Float16>();
  check_rounding<BFloat16>();
  check_rounding<Float16>();
  CHECK(is_finite(0.0) && is_finite(1e308));
  CHECK(!is_finite(std::numeric_limits<double>::infinity()) && !is_finite(std::nan("")));
  return check::result();
}
