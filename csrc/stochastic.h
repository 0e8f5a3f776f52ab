// Stochastic rounding to bfloat16: up or down at random, each with the probability that makes the
// mean the value itself. The random bits have no state: they are a function of the step's number
// and of the element, whatever the thread, the device or the instruction set.
#pragma once

#include "numeric.h"

namespace fuse_ext {

// A permutation of the 32-bit numbers in which every bit of the result depends evenly on every bit
// of x (lowbias32 of C. Wellons' hash-prospector).
FUSE_INLINE std::uint32_t mixed(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// What distinguishes the random bits of one step from those of others.
struct RandomKey {
  std::uint32_t first, second;
};

FUSE_INLINE RandomKey random_key(std::int64_t step) {
  const auto number = static_cast<std::uint64_t>(step);
  const auto high = static_cast<std::uint32_t>(number >> 32);
  const std::uint32_t first = mixed(static_cast<std::uint32_t>(number) ^ mixed(high));
  return {first, mixed(first + 0x9e3779b9u)};
}

// 32 random bits of an element of the flat vector: mixed() with the key in two places. Elements
// 2^32 apart share theirs.
FUSE_INLINE std::uint32_t random_bits(std::uint32_t element, const RandomKey& key) {
  std::uint32_t x = element + key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du ^ key.second;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Rounds away from zero where the 16 bits that bfloat16 drops and `random` (16 bits) have a carry:
// with probability dropped / 2^16. From the largest bfloat16 on the bits are cut off instead, so
// that what is finite stays so; and so do infinities and NaN (those that arithmetic yields have a
// bit set that is kept).
FUSE_INLINE void store_stochastic(BFloat16* out, float value, std::uint32_t random) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t carry = (bits & 0x7fffffffu) < 0x7f7f0000u ? random : 0u;
  out->bits = static_cast<std::uint16_t>((bits + carry) >> 16);
}

}  // namespace fuse_ext
