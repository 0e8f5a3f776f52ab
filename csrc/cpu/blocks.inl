// Blocks of the flat vectors: conversion between storage and arithmetic types,
// and assembly of a block from the segments that it crosses.
#pragma once

namespace fuse_ext {
namespace {

// a b + c: one instruction and one rounding where the level has fused
// multiply-adds. (The compiler may not fuse on its own: Adam's step is the same
// at every level.)
#if defined(FUSE_CPU_FMA) || defined(__ARM_FEATURE_FMA)
FUSE_INLINE float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FUSE_INLINE double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
FUSE_INLINE float mul_add(float a, float b, float c) { return a * b + c; }
FUSE_INLINE double mul_add(double a, double b, double c) { return a * b + c; }
#endif

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;
}

// Has the lines fetched into the second level's cache that lie so many bytes behind
// [from, from + n).
template <std::int64_t n, class T>
FUSE_INLINE void fetch_ahead(const T* from, std::int64_t bytes) {
  constexpr std::int64_t kLine = 64, kSize = n * static_cast<std::int64_t>(sizeof(T));
  const char* const at = reinterpret_cast<const char*>(from) + bytes;
  for (std::int64_t line = 0; line < kSize; line += kLine) __builtin_prefetch(at + line, 0, 2);
}

// Calls visit(pointer to element `first`) with the pointer's real type.
template <class Void, class Visit>
FUSE_INLINE void with_type(DType dtype, Void* base, std::int64_t first, Visit&& visit) {
  constexpr bool read_only = std::is_const_v<Void>;
  auto at = [&](auto* tag) {
    using Element = std::remove_pointer_t<decltype(tag)>;
    using Pointer = std::conditional_t<read_only, const Element*, Element*>;
    visit(static_cast<Pointer>(base) + first);
  };
  switch (dtype) {
    case DType::f32: at(static_cast<float*>(nullptr)); break;
    case DType::f64: at(static_cast<double*>(nullptr)); break;
    case DType::bf16: at(static_cast<BFloat16*>(nullptr)); break;
    case DType::f16: at(static_cast<Float16*>(nullptr)); break;
    case DType::i8: break;  // rows only: read_row, write_row
  }
}

// Elements [first, first + n) as T: the memory itself where it holds T, else
// converted copies.
template <class T>
FUSE_INLINE const T* read(DType dtype, const void* base, std::int64_t first, std::int64_t n,
                          T* scratch) {
  if (dtype == dtype_of<T>()) return static_cast<const T*>(base) + first;
  with_type(dtype, base, first, [&](const auto* in) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) scratch[i] = load<T>(in[i]);
  });
  return scratch;
}

// Stores n values from `first` on; with `keep` the values become what was
// stored.
template <class T>
FUSE_INLINE void write(DType dtype, void* base, std::int64_t first, std::int64_t n, T* values,
                       bool keep) {
  with_type(dtype, base, first, [&](auto* out) {
    if (static_cast<const void*>(out) == values) return;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) store(&out[i], values[i]);
    if (keep && dtype != dtype_of<T>()) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) values[i] = load<T>(out[i]);
    }
  });
}

// The effective gradient g = sign * grad + weight_decay * param on [begin,
// end), at most kBlock elements: the user's own memory where it can be used as
// it is, else `scratch`.
template <class T>
FUSE_INLINE const T* load_gradient(const SegmentTable& table, std::int64_t begin, std::int64_t end,
                                   T sign, T* scratch) {
  const std::int64_t only = table.first_ending_after(begin);
  if (sign == T(1) && only < table.count) {
    const Segment& s = table.segments[only];
    if (s.offset <= begin && end <= s.offset + s.numel && s.grad_dtype == dtype_of<T>() &&
        s.weight_decay == 0.0) {
      return static_cast<const T*>(s.grad) + (begin - s.offset);
    }
  }
  std::int64_t filled = begin;
  T param_scratch[kBlock];
  table.for_each_piece(begin, end,
                       [&](const Segment& s, std::int64_t first, std::int64_t at, std::int64_t n) {
    for (; filled < at; ++filled) scratch[filled - begin] = T(0);
    T* out = scratch + (at - begin);
    with_type(s.grad_dtype, s.grad, first, [&](const auto* in) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] = sign * load<T>(in[i]);
    });
    if (s.weight_decay != 0.0) {
      const T decay = static_cast<T>(s.weight_decay);
      const T* param = read<T>(s.param_dtype, s.param, first, n, param_scratch);
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] += decay * param[i];
    }
    filled = at + n;
  });
  for (; filled < end; ++filled) scratch[filled - begin] = T(0);
  return scratch;
}

template <class T>
FUSE_INLINE void read_scaled(const std::int8_t* in, float scale, std::int64_t n, T* out) {
  const T factor = static_cast<T>(scale);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) out[i] = factor * static_cast<T>(in[i]);
}

// Elements [first, first + n) of a history row as T.
template <class T>
FUSE_INLINE const T* read_row(const Row& row, std::int64_t first, std::int64_t n, T* scratch) {
  if (row.dtype != DType::i8) return read<T>(row.dtype, row.data, first, n, scratch);
  const std::int8_t* values = static_cast<const std::int8_t*>(row.data);
  const std::int64_t end = first + n;
  for (std::int64_t at = first; at < end;) {
    const std::int64_t block = at / kScaleBlock, stop = (block + 1) * kScaleBlock;
    const std::int64_t length = (stop < end ? stop : end) - at;
    T* out = scratch + (at - first);
    if (length == kScaleBlock) {  // a constant length: unrolled
      read_scaled<T>(values + at, row.scales[block], kScaleBlock, out);
    } else {
      read_scaled<T>(values + at, row.scales[block], length, out);
    }
    at += length;
  }
  return scratch;
}

// Where values to be stored in a row from `first` on may be made: there, if it holds T.
template <class T>
FUSE_INLINE T* place_in_row(const Row& row, std::int64_t first, T* scratch) {
  return row.dtype == dtype_of<T>() ? static_cast<T*>(row.data) + first : scratch;
}

FUSE_INLINE std::uint32_t value_bits(float value) { return float_bits(value); }
FUSE_INLINE std::uint64_t value_bits(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The bits of |value|, as a whole number: in the order of the magnitudes, and with those of
// infinity and NaN above all others.
template <class T>
FUSE_INLINE auto magnitude_bits(T value) {
  const auto bits = value_bits(value);
  return bits & (static_cast<decltype(bits)>(-1) >> 1);
}

constexpr int kLargestByte = 127;

// The scale of a block of a row in 8 bits. With a value that is not finite it is NaN, and so is
// then every value read back.
template <class T>
FUSE_INLINE float block_scale(std::int64_t n, const T* values) {
  decltype(value_bits(T(0))) bits = 0;
#pragma omp simd reduction(max : bits)
  for (std::int64_t i = 0; i < n; ++i) {
    const auto magnitude = magnitude_bits(values[i]);
    bits = magnitude > bits ? magnitude : bits;
  }
  T largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const T poison = largest * T(0);
  return static_cast<float>(largest / T(kLargestByte) + poison);
}

// A block in 8 bits, rounded to nearest, ties to even; the values become what was stored.
template <class T>
FUSE_INLINE void write_scaled(std::int8_t* out, float scale, std::int64_t n, T* values) {
  // Adding 1.5 * 2^p leaves the nearest whole number in the last bits, and its last byte there as
  // it is. No value exceeds 127 scales but where the scale is NaN, and so is then what is read
  // back.
  constexpr T kRound = sizeof(T) == sizeof(float) ? T(0x1.8p23) : T(0x1.8p52);
  const T stored_scale = static_cast<T>(scale);
  const T inverse = scale >= kLeastScale ? T(1) / stored_scale : T(0);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const T rounded = values[i] * inverse + kRound;
    out[i] = static_cast<std::int8_t>(value_bits(rounded));
    values[i] = (rounded - kRound) * stored_scale;
  }
}

// Stores n values in a row from `first` on, a multiple of kScaleBlock; the
// values become what was stored.
template <class T>
FUSE_INLINE void write_row(const Row& row, std::int64_t first, std::int64_t n, T* values) {
  if (row.dtype != DType::i8) return write<T>(row.dtype, row.data, first, n, values, true);
  std::int8_t* const out = static_cast<std::int8_t*>(row.data) + first;
  float* const scales = row.scales + first / kScaleBlock;
  const std::int64_t whole = n / kScaleBlock * kScaleBlock;
  // Blocks of a constant length are unrolled; and all scales come first, as each waits for its
  // whole block, but not for the others.
  for (std::int64_t at = 0; at < whole; at += kScaleBlock) {
    scales[at / kScaleBlock] = block_scale<T>(kScaleBlock, values + at);
  }
  for (std::int64_t at = 0; at < whole; at += kScaleBlock) {
    write_scaled<T>(out + at, scales[at / kScaleBlock], kScaleBlock, values + at);
  }
  if (whole == n) return;
  scales[whole / kScaleBlock] = block_scale<T>(n - whole, values + whole);
  write_scaled<T>(out + whole, scales[whole / kScaleBlock], n - whole, values + whole);
}

}  // namespace
}  // namespace fuse_ext
