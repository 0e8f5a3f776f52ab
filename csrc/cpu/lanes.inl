// Vectors of the level's width, FUSE_CPU_LANE_BYTES.
#pragma once

#include "blocks.inl"

#if !defined(FUSE_CPU_LANE_BYTES)
#define FUSE_CPU_LANE_BYTES 16
#endif

namespace fuse_ext {
namespace {

template <class T>
struct LanesOf {
  typedef T type __attribute__((vector_size(FUSE_CPU_LANE_BYTES)));
};
template <class T>
using Lanes = typename LanesOf<T>::type;
using Words = Lanes<std::uint32_t>;

template <class T>
constexpr std::int64_t kLanes = FUSE_CPU_LANE_BYTES / static_cast<std::int64_t>(sizeof(T));

// At any address.
template <class T>
FUSE_INLINE Lanes<T> load_lanes(const T* from) {
  Lanes<T> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
template <class T>
FUSE_INLINE void store_lanes(T* to, Lanes<T> lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}
FUSE_INLINE Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

// n values, stored without reading the memory behind `out` into the caches first, and without
// leaving anything there: for more than they hold, to be read again much later.
template <class T>
FUSE_INLINE void copy_past_caches(const T* in, std::int64_t n, T* out) {
#if defined(__x86_64__)
  constexpr std::uintptr_t kWidth = FUSE_CPU_LANE_BYTES;
  std::int64_t i = 0;
  while (i < n && reinterpret_cast<std::uintptr_t>(out + i) % kWidth != 0) out[i] = in[i], ++i;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Lanes<T> lanes = load_lanes(in + i);
#if FUSE_CPU_LANE_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), (__m512i)lanes);
#elif FUSE_CPU_LANE_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)lanes);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), (__m128i)lanes);
#endif
  }
  for (; i < n; ++i) out[i] = in[i];
#else
  std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(T));
#endif
}
// Other threads see what was stored so only after this.
FUSE_INLINE void end_copies_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Minus nothing, and not plus: so -0 stays -0, and compilers leave the sum out.
template <class T>
FUSE_INLINE Lanes<T> all_lanes(T value) {
  return value - Lanes<T>{};
}

// The first and the second half of a vector.
template <class Vector>
struct Halves {
  using Element = std::remove_cvref_t<decltype(Vector{}[0])>;
  typedef Element Half __attribute__((vector_size(sizeof(Vector) / 2)));
  Half low, high;

  FUSE_MEMBER explicit Halves(Vector whole) { std::memcpy(this, &whole, sizeof whole); }
};

FUSE_INLINE double sum_of_doubles(double sum) { return sum; }
template <class Vector>
FUSE_INLINE double sum_of_doubles(Vector doubles) {
  const Halves<Vector> halves(doubles);
  if constexpr (sizeof halves.low == sizeof(double)) {
    return halves.low[0] + halves.high[0];
  } else {
    return sum_of_doubles(halves.low + halves.high);
  }
}

// In double, by halves.
FUSE_INLINE double sum_of_lanes(Lanes<double> lanes) { return sum_of_doubles(lanes); }
FUSE_INLINE double sum_of_lanes(Lanes<float> lanes) {
  const Halves<Lanes<float>> halves(lanes);
  return sum_of_doubles(__builtin_convertvector(halves.low, Lanes<double>) +
                        __builtin_convertvector(halves.high, Lanes<double>));
}

// a b + c in every lane, rounded as by mul_add. Intrinsics where there are some: lane by lane, GCC
// may send the vectors through memory.
#if defined(FUSE_CPU_FMA) && FUSE_CPU_LANE_BYTES == 64
FUSE_INLINE Lanes<float> mul_add_lanes(Lanes<float> a, Lanes<float> b, Lanes<float> c) {
  return (Lanes<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FUSE_INLINE Lanes<double> mul_add_lanes(Lanes<double> a, Lanes<double> b, Lanes<double> c) {
  return (Lanes<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(FUSE_CPU_FMA) && FUSE_CPU_LANE_BYTES == 32
FUSE_INLINE Lanes<float> mul_add_lanes(Lanes<float> a, Lanes<float> b, Lanes<float> c) {
  return (Lanes<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FUSE_INLINE Lanes<double> mul_add_lanes(Lanes<double> a, Lanes<double> b, Lanes<double> c) {
  return (Lanes<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__ARM_FEATURE_FMA)
template <class Vector>
FUSE_INLINE Vector mul_add_lanes(Vector a, Vector b, Vector c) {
  Vector result;
  for (unsigned k = 0; k < sizeof a / sizeof a[0]; ++k) result[k] = mul_add(a[k], b[k], c[k]);
  return result;
}
#else
template <class Vector>
FUSE_INLINE Vector mul_add_lanes(Vector a, Vector b, Vector c) {
  return a * b + c;
}
#endif

// kLanes bytes with a sign, as floats. Where there is no instruction for it, they are better taken
// out of words (rows.inl).
#if defined(FUSE_CPU_FMA)
#define FUSE_CPU_WIDENS 1
FUSE_INLINE Lanes<float> load_bytes(const std::int8_t* from) {
#if FUSE_CPU_LANE_BYTES == 64
  // With a mask of all: GCC 12 warns of the other form.
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m512i words = _mm512_maskz_cvtepi8_epi32(0xffff, bytes);
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m256i words = _mm256_cvtepi8_epi32(bytes);
#endif
  return __builtin_convertvector((Lanes<std::int32_t>)words, Lanes<float>);
}
#endif

}  // namespace
}  // namespace fuse_ext
