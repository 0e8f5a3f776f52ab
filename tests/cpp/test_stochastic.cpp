// Stochastic rounding: how often a value is rounded up, by definition, and values apart; and that
// the hash behind the random bits is a permutation.
#include "stochastic.h"

#include <limits>

#include "check.h"

using namespace fuse_ext;

namespace {

BFloat16 rounded(float value, std::uint32_t random) {
  BFloat16 out;
  store_stochastic(&out, value, random);
  return out;
}

// Of all 2^16 random numbers as many round away from zero as the dropped bits say.
void check_shares(float value) {
  const std::uint32_t bits = float_bits(value);
  std::uint32_t away = 0;
  for (std::uint32_t random = 0; random < 0x10000u; ++random) {
    const std::uint32_t step = rounded(value, random).bits - (bits >> 16);
    if (step > 1) check::failed(__FILE__, __LINE__, "rounded to no neighbour");
    away += step;
  }
  CHECK_EQUAL(away, bits & 0xffffu);
}

void check_kept(float value) {
  for (const std::uint32_t random : {0u, 1u, 0x8000u, 0xffffu}) {
    const float back = load<float>(rounded(value, random));
    if (value == value) {
      CHECK_EQUAL(back, value);
    } else if (back == back) {
      check::failed(__FILE__, __LINE__, "NaN became a number");
    }
  }
}

// x from mixed(x): xor-shifts by half of the bits undo themselves, odd factors have inverses.
std::uint32_t unmixed(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x43021123u;
  x ^= x >> 15 ^ x >> 30;
  x *= 0x1d69e2a5u;
  return x ^ x >> 16;
}

}  // namespace

int main() {
  const float largest = load<float>(BFloat16{0x7f7f});
  for (const float sign : {1.0f, -1.0f}) {
    for (const float value : {1.0f, 1.001f, 3.14159f, 0x1.fffffep0f, 0x1p-126f, 0x1.8p-130f, 1e-45f,
                              3e38f, 0x1.fffffep126f}) {
      check_shares(sign * value);
    }
    for (const float value :
         {0.0f, 1.0f, 1.5f, largest, 0x1p-133f, std::numeric_limits<float>::infinity(),
          std::numeric_limits<float>::quiet_NaN(), bits_float(0x7fffffffu)}) {
      check_kept(sign * value);
    }
    // What is above the largest bfloat16 becomes it, and not infinity.
    const float above = sign * std::numeric_limits<float>::max();
    CHECK_EQUAL(load<double>(rounded(above, 0xffffu)), static_cast<double>(sign * largest));
  }
  check::Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const std::uint32_t x = random.bits();
    CHECK_EQUAL(unmixed(mixed(x)), x);
  }
  // The whole number of the step counts.
  const RandomKey keys[] = {random_key(1), random_key(2), random_key(std::int64_t{1} << 32 | 1)};
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < i; ++k) CHECK_EQUAL(keys[i].first == keys[k].first, false);
  }
  return check::result();
}
