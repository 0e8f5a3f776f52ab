// Number formats and small helpers shared by every backend. No torch types.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSE_INLINE static __host__ __device__ __forceinline__
#define FUSE_MEMBER __host__ __device__ __forceinline__
#else
// always_inline: these helpers are compiled into several instruction-set levels, and a shared
// out-of-line copy could carry instructions that the running CPU lacks.
#define FUSE_INLINE static inline __attribute__((always_inline))
#define FUSE_MEMBER inline __attribute__((always_inline))
#endif

namespace fuse_ext {

// i8 is a format of history rows alone: whole numbers in [-127, 127] times one
// scale per kScaleBlock elements.
enum class DType : std::uint8_t { f32, f64, bf16, f16, i8 };

constexpr std::int64_t kScaleBlock = 128;

// Bytes of an element.
FUSE_INLINE constexpr int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2;
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

FUSE_INLINE std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FUSE_INLINE float bits_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// load: storage -> arithmetic type T (float or double).
template <class T>
FUSE_INLINE T load(float value) {
  return static_cast<T>(value);
}
template <class T>
FUSE_INLINE T load(double value) {
  return static_cast<T>(value);
}
template <class T>
FUSE_INLINE T load(BFloat16 value) {
  return static_cast<T>(bits_float(static_cast<std::uint32_t>(value.bits) << 16));
}
template <class T>
FUSE_INLINE T load(Float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const std::uint32_t normal = magnitude + 0x38000000u;  // the exponent's bias: 127 instead of 15
  // A subnormal is a multiple of 2^-24: put behind the leading one of 2^-14, which is taken off
  // again. No operand is subnormal in float32, so that flushing those to zero changes nothing.
  const float subnormal = bits_float(magnitude + 0x38800000u) - 0x1p-14f;
  const std::uint32_t finite = magnitude < 0x00800000u ? float_bits(subnormal) : normal;
  const std::uint32_t special = magnitude | 0x7f800000u;  // infinity or NaN
  const std::uint32_t bits = magnitude >= 0x0f800000u ? special : finite;
  return static_cast<T>(bits_float(bits | sign));
}

// store: arithmetic type -> storage, rounding to nearest even.
FUSE_INLINE void store(float* out, float value) { *out = value; }
FUSE_INLINE void store(float* out, double value) { *out = static_cast<float>(value); }
FUSE_INLINE void store(double* out, double value) { *out = value; }
FUSE_INLINE void store(double* out, float value) { *out = static_cast<double>(value); }
FUSE_INLINE void store(BFloat16* out, float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded);
}
FUSE_INLINE void store(Float16* out, float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 adding 0.5 aligns the mantissa so that the FPU itself rounds to a subnormal.
  const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const std::uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = static_cast<std::uint16_t>((magnitude >= 0x477ff000u ? special : finite) | sign);
}
FUSE_INLINE void store(BFloat16* out, double value) { store(out, static_cast<float>(value)); }
FUSE_INLINE void store(Float16* out, double value) { store(out, static_cast<float>(value)); }

FUSE_INLINE bool is_finite(double value) { return value - value == 0.0; }

}  // namespace fuse_ext
