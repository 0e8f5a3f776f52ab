// Packs of history rows, of any format; and the ring of curvature pairs as a kernel sees it.
#pragma once

#include "packs.cuh"
#include "reduce.cuh"

namespace fuse_ext::cuda {

constexpr float kLargestByte = 127;

// The place-th of a word's four bytes, with its sign. Put behind the exponent of 2^23 its bits are
// a float without a conversion, which the hardware makes slowly.
template <class T>
__device__ __forceinline__ T signed_byte(std::uint32_t word, int place) {
  constexpr std::uint32_t kSigns = 0x80808080u, kExponent = 0x4b000000u;
  const std::uint32_t bits =
      __byte_perm(word ^ kSigns, kExponent, 0x7440u | static_cast<std::uint32_t>(place));
  return static_cast<T>(bits_float(bits) - (0x1p23f + 128.0f));
}

__device__ __forceinline__ float scale_at(const Row& row, Index at) {
  return bits_float(load_common<std::uint32_t>(row.scales + at / kScaleBlock));
}

// U packs of W elements of a row, the first at `at`, the next ones kPackStep<W> further. A pack of
// several lies within one scale block.
template <int W, int U, class T>
__device__ __forceinline__ void load_row(const Row& row, Index at, T (&out)[U][W]) {
  const void* const from = byte_offset(static_cast<const void*>(row.data), at * size_of(row.dtype));
  if (row.dtype != DType::i8) return load_elements<W, U>(row.dtype, from, out);
  if constexpr (W % 4 == 0) {
    std::uint32_t words[U][W / 4];
    float scales[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      load_words<W>(byte_offset(from, u * kPackStep<W>), words[u]);
      scales[u] = scale_at(row, at + u * kPackStep<W>);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        out[u][k] = static_cast<T>(scales[u]) * signed_byte<T>(words[u][k / 4], k % 4);
      }
    }
  } else {
    static_assert(W == 1 && U == 1);
    out[0][0] =
        static_cast<T>(scale_at(row, at)) * signed_byte<T>(load_global<std::uint8_t>(from), 0);
  }
}

// The pack [at, at + N) of a row, zeros from `numel` on. `whole`: it may be moved together.
template <int N, class T>
__device__ __forceinline__ void load_row_pack(const Row& row, Index at, Index numel, bool whole,
                                              T (&out)[N]) {
  T values[1][N];
  if (whole) load_row<N, 1>(row, at, values);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T value[1][1] = {{T(0)}};
    if (!whole && at + k < numel) load_row<1, 1>(row, at + k, value);
    out[k] = whole ? values[0][k] : value[0][0];
  }
}

// A pack in 8 bits, rounded to nearest; the values become what was stored, or what would be without
// `writes`. Every lane of the warp takes part, as neighbours share a block and its scale. The scale
// of a block with a value that is not finite is NaN, and so is then every value read back.
template <int N, class T>
__device__ __forceinline__ void store_bytes(const Row& row, Index at, Index numel, bool whole,
                                            T (&values)[N], bool writes) {
  constexpr int kLanes = static_cast<int>(kScaleBlock) / N;
  static_assert(kLanes <= kWarp && N % 4 == 0);
  constexpr T kLargest = static_cast<T>(kLargestByte);
  T largest = 0, poison = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!whole && at + k >= numel) values[k] = T(0);
    largest = larger(largest, magnitude_of(values[k]));
    poison += values[k] * T(0);
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    poison += __shfl_xor_sync(kAllLanes, poison, distance);
  }
  const float stored_scale = static_cast<float>(largest / kLargest + poison);
  __syncwarp();  // all lanes have read the old scale, where they did
  if (writes && at % kScaleBlock == 0 && at < numel) {
    store_global(row.scales + at / kScaleBlock, float_bits(stored_scale));
  }
  const T scale = static_cast<T>(stored_scale);
  const T inverse = stored_scale >= kLeastScale ? T(1) / scale : T(0);
  std::uint32_t words[N / 4] = {};
#pragma unroll
  for (int k = 0; k < N; ++k) {
    // Adding and subtracting 1.5 * 2^p rounds to the nearest whole number, ties to even.
    constexpr T kRound = sizeof(T) == sizeof(float) ? T(0x1.8p23) : T(0x1.8p52);
    const T near = (values[k] * inverse + kRound) - kRound;
    const T bounded = near > kLargest ? kLargest : (near >= -kLargest ? near : -kLargest);
    words[k / 4] |= (static_cast<std::uint32_t>(static_cast<int>(bounded)) & 0xffu)
                    << (8 * (k % 4));
    values[k] = bounded * scale;
  }
  if (!writes) return;
  void* const to = byte_offset(row.data, at);
  if (whole) return store_words<N>(to, words);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (at + k < numel) {
      store_global(byte_offset(to, k), static_cast<std::uint8_t>(words[k / 4] >> (8 * (k % 4))));
    }
  }
}

// Stores a pack, for as far as the row goes; the values become what was stored, or what would be
// without `writes`. To be called by all lanes of a warp together.
template <int N, class T>
__device__ __forceinline__ void store_row_pack(const Row& row, Index at, Index numel, bool whole,
                                               T (&values)[N], bool writes = true) {
  if constexpr (N % 4 == 0) {
    if (row.dtype == DType::i8) return store_bytes<N>(row, at, numel, whole, values, writes);
  }
  if (!writes) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (row.dtype == DType::f32) {
        values[k] = static_cast<T>(static_cast<float>(values[k]));
      } else if (row.dtype != DType::f64) {
        values[k] = half_value<T>(row.dtype, half_bits(row.dtype, static_cast<float>(values[k])));
      }
    }
    return;
  }
  void* const to = byte_offset(row.data, at * size_of(row.dtype));
  if (whole) return store_pack<N, true>(row.dtype, to, values);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (at + k < numel) {
      values[k] = store_one(row.dtype, byte_offset(to, k * size_of(row.dtype)), values[k]);
    }
  }
}

// Whatever the scalars hold, no slot lies outside of the ring: a NaN from a damaged checkpoint
// must not become an address. The two-loop recursion then makes the direction NaN, which shows.
__device__ __forceinline__ bool is_ring(LbfgsScalars state) {
  const double limit = static_cast<double>(state.slots);
  return state[kOpen] >= 0.0 && state[kOpen] < limit && state[kCount] >= 0.0 &&
         state[kCount] < limit;
}

struct RingPosition {
  Index open, count, slots;

  __device__ __forceinline__ explicit RingPosition(LbfgsScalars state)
      : open(0), count(0), slots(state.slots) {
    if (is_ring(state)) open = state.open(), count = state.count();
  }
  // The slot before one, cyclically: the next older pair.
  __device__ __forceinline__ Index older(Index slot) const {
    return slot == 0 ? slots - 1 : slot - 1;
  }
  // The slot of the age-th newest pair.
  __device__ __forceinline__ Index at_age(Index age) const {
    return open > age ? open - 1 - age : open - 1 - age + slots;
  }
};

// A row of the ring. With `dtype` known to the compiler, so is its format.
__device__ __forceinline__ Row row_of(const Ring& ring, DType dtype, int side, Index slot) {
  return {ring.data + side * ring.side_bytes + slot * ring.slot_bytes,
          ring.scales == nullptr ? nullptr
                                 : ring.scales + side * ring.side_scales + slot * ring.slot_scales,
          dtype};
}
__device__ __forceinline__ Row open_s_row(const Ring& ring) {
  return row_of(ring, ring.row_dtype, 0, RingPosition(ring.scalars).open);
}

// Whether all rows start where whole packs may.
inline bool rows_are_aligned(const Ring& ring) {
  return is_aligned(ring.data, 16) && ring.slot_bytes % 16 == 0 && ring.side_bytes % 16 == 0;
}

}  // namespace fuse_ext::cuda
