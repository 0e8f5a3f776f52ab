// Packs: a few consecutive elements of a flat vector in one thread's registers, moved by accesses
// of up to 128 bits and converted between storage and arithmetic types.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace fuse_ext::cuda {

template <class T>
__host__ __device__ __forceinline__ constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// Bytes that the address of an access of `bytes` must be a multiple of.
__host__ __device__ __forceinline__ constexpr int alignment_of(int bytes) {
  return bytes < 16 ? bytes : 16;
}

// `bytes` is a power of two; kernels that ask do not divide.
__host__ __device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return (reinterpret_cast<std::uintptr_t>(pointer) & static_cast<std::uintptr_t>(bytes - 1)) == 0;
}

template <class Void>
__device__ __forceinline__ Void* byte_offset(Void* base, Index bytes) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return static_cast<Byte*>(base) + bytes;
}

// One access to global memory. (A pointer found in memory is generic to the compiler, and a store
// of a vector may be split, unless they are told.)
template <class Word>
__device__ __forceinline__ Word load_global(const void* from) {
  const Word* const word = static_cast<const Word*>(from);
  FUSE_ASSUME_GLOBAL(word);
  return *word;
}
// The same for a word that neighbouring lanes read too: the memory is asked for it once.
template <class Word>
__device__ __forceinline__ Word load_common(const void* from) {
  const Word* const word = static_cast<const Word*>(from);
  FUSE_ASSUME_COMMON(word);
  return *word;
}
template <class Word>
__device__ __forceinline__ void store_global(void* to, Word value) {
  FUSE_STORE_GLOBAL(static_cast<Word*>(to), value);
}

// Whole words between global memory and registers; `bytes` is 4, 8 or a multiple of 16.
template <int bytes>
__device__ __forceinline__ void load_words(const void* from, std::uint32_t* words) {
  if constexpr (bytes >= 16) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) {
      const uint4 word = load_global<uint4>(byte_offset(from, 16 * i));
      words[4 * i] = word.x, words[4 * i + 1] = word.y;
      words[4 * i + 2] = word.z, words[4 * i + 3] = word.w;
    }
  } else if constexpr (bytes == 8) {
    const uint2 word = load_global<uint2>(from);
    words[0] = word.x, words[1] = word.y;
  } else {
    words[0] = load_global<std::uint32_t>(from);
  }
}

template <int bytes>
__device__ __forceinline__ void store_words(void* to, const std::uint32_t* words) {
  if constexpr (bytes >= 16) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) {
      store_global(byte_offset(to, 16 * i),
                   make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
    }
  } else if constexpr (bytes == 8) {
    store_global(to, make_uint2(words[0], words[1]));
  } else {
    store_global(to, words[0]);
  }
}

__device__ __forceinline__ double words_double(std::uint32_t low, std::uint32_t high) {
  const std::uint64_t bits = static_cast<std::uint64_t>(high) << 32 | low;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// One element of 16 bits.
template <class T>
__device__ __forceinline__ T half_value(DType dtype, std::uint16_t bits) {
  return static_cast<T>(dtype == DType::bf16 ? fuse_ext::load<float>(BFloat16{bits})
                                             : FUSE_FLOAT_OF_HALF(bits));
}

// Rounded to nearest even, by the hardware; a NaN becomes the one that the CPU's kernels write.
__device__ __forceinline__ std::uint16_t half_bits(DType dtype, float value) {
  const bool is_nan = value != value;
  if (dtype == DType::bf16) {
    return is_nan ? std::uint16_t{0x7fc0} : FUSE_BFLOAT_OF_FLOAT(value);
  }
  const auto nan_bits = static_cast<std::uint16_t>((float_bits(value) >> 16 & 0x8000u) | 0x7e00u);
  return is_nan ? nan_bits : FUSE_HALF_OF_FLOAT(value);
}

// The bits of U packs of N elements of a dtype of at most `widest` bytes, known only at run time.
// Loading apart from converting lets several loads be under way together.
template <int N, int widest, int U = 1>
struct Bits {
  std::uint32_t words[U][N * widest / 4];

  // The packs begin `step` elements apart.
  __device__ __forceinline__ void load(DType dtype, const void* from, Index step = 0) {
    if (size_of(dtype) == 2) {
#pragma unroll
      for (int u = 0; u < U; ++u) load_words<2 * N>(byte_offset(from, u * step * 2), words[u]);
    } else if (widest == 4 || size_of(dtype) == 4) {
#pragma unroll
      for (int u = 0; u < U; ++u) load_words<4 * N>(byte_offset(from, u * step * 4), words[u]);
    } else if constexpr (widest == 8) {
#pragma unroll
      for (int u = 0; u < U; ++u) load_words<8 * N>(byte_offset(from, u * step * 8), words[u]);
    }
  }

  template <class T>
  __device__ __forceinline__ void convert(DType dtype, T (&out)[U][N]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) convert_pack(dtype, words[u], out[u]);
  }
  template <class T>
  __device__ __forceinline__ void convert(DType dtype, T (&out)[N]) const {
    convert_pack(dtype, words[0], out);
  }

 private:
  template <class T>
  static __device__ __forceinline__ void convert_pack(DType dtype, const std::uint32_t* word,
                                                      T (&out)[N]) {
    if (size_of(dtype) == 2) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        out[k] = half_value<T>(dtype, static_cast<std::uint16_t>(word[k / 2] >> (16 * (k % 2))));
      }
    } else if (widest == 4 || size_of(dtype) == 4) {
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = static_cast<T>(bits_float(word[k]));
    } else if constexpr (widest == 8) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        out[k] = static_cast<T>(words_double(word[2 * k], word[2 * k + 1]));
      }
    }
  }
};

// N elements at `to`, rounded to the dtype. With `keep` the values become what was stored.
template <int N, bool keep, class T>
__device__ __forceinline__ void store_pack(DType dtype, void* to, T (&values)[N]) {
  std::uint32_t words[2 * N];
  if (size_of(dtype) == 2) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      std::uint32_t word = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint16_t bits = half_bits(dtype, static_cast<float>(values[k + half]));
        if (keep) values[k + half] = half_value<T>(dtype, bits);
        word |= static_cast<std::uint32_t>(bits) << (16 * half);
      }
      words[k / 2] = word;
    }
    store_words<2 * N>(to, words);
  } else if (dtype == DType::f32) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float stored = static_cast<float>(values[k]);
      if (keep) values[k] = static_cast<T>(stored);
      words[k] = float_bits(stored);
    }
    store_words<4 * N>(to, words);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double stored = static_cast<double>(values[k]);
      std::uint64_t bits;
      std::memcpy(&bits, &stored, sizeof bits);
      words[2 * k] = static_cast<std::uint32_t>(bits);
      words[2 * k + 1] = static_cast<std::uint32_t>(bits >> 32);
    }
    store_words<8 * N>(to, words);
  }
}

// One element.
template <class T>
__device__ __forceinline__ T load_one(DType dtype, const void* from) {
  switch (size_of(dtype)) {
    case 8: {
      const uint2 word = load_global<uint2>(from);
      return static_cast<T>(words_double(word.x, word.y));
    }
    case 4: return static_cast<T>(bits_float(load_global<std::uint32_t>(from)));
    default: return half_value<T>(dtype, load_global<std::uint16_t>(from));
  }
}

__device__ __forceinline__ double read(Number number) {
  return load_one<double>(number.dtype, number.data);
}

// Returns the value as stored.
template <class T>
__device__ __forceinline__ T store_one(DType dtype, void* to, T value) {
  switch (dtype) {
    case DType::f64: {
      const double stored = static_cast<double>(value);
      std::uint32_t words[2];
      std::memcpy(words, &stored, sizeof stored);
      store_words<8>(to, words);
      return value;
    }
    case DType::f32: {
      const float stored = static_cast<float>(value);
      store_global(to, float_bits(stored));
      return static_cast<T>(stored);
    }
    default: {
      const std::uint16_t bits = half_bits(dtype, static_cast<float>(value));
      store_global(to, bits);
      return half_value<T>(dtype, bits);
    }
  }
}

// Addresses of a segment's elements from `first` on.
__device__ __forceinline__ void* param_at(const Segment& s, Index first) {
  return byte_offset(s.param, first * size_of(s.param_dtype));
}
__device__ __forceinline__ const void* grad_at(const Segment& s, Index first) {
  return byte_offset(s.grad, first * size_of(s.grad_dtype));
}

// Whether N elements of the parameter, and of the gradient where there is one, may be moved
// together. For arithmetic in float, float64 elements are taken one by one.
template <class T, int N>
__device__ __forceinline__ bool moves_whole(const Segment& s, Index first) {
  const int param_size = size_of(s.param_dtype), grad_size = size_of(s.grad_dtype);
  return param_size <= static_cast<int>(sizeof(T)) && grad_size <= static_cast<int>(sizeof(T)) &&
         is_aligned(param_at(s, first), alignment_of(N * param_size)) &&
         (s.grad == nullptr || is_aligned(grad_at(s, first), alignment_of(N * grad_size)));
}

template <int W>
using Width = std::integral_constant<int, W>;

// Where a thread stands in the table; what it finds there it reads again for every pack or element.
struct SegmentPlace {
  Index index;  // the first segment that ends after the place; perhaps none does

  // Goes on to a later place, few steps away.
  __device__ __forceinline__ void advance(const SegmentTable& table, Index place) {
    while (index < table.count &&
           table.segments[index].offset + table.segments[index].numel <= place) {
      ++index;
    }
  }
  __device__ __forceinline__ Segment found(const SegmentTable& table) const {
    return table.segments[index];
  }
};

// The same with what it finds there in registers, for kernels that have some to spare: the table
// is read where a segment ends.
struct CurrentSegment {
  int index;        // a register fewer than an Index
  Segment segment;  // where there is one

  __device__ __forceinline__ void advance(const SegmentTable& table, Index place) {
    if (index >= table.count || segment.offset + segment.numel > place) return;
    SegmentPlace next{index + 1};
    next.advance(table, place);
    index = static_cast<int>(next.index);
    if (index < table.count) segment = table.segments[index];
  }
  __device__ __forceinline__ const Segment& found(const SegmentTable&) const { return segment; }
};

// Whether `length` elements from a flat place on lie in a segment, and packs of N of them may be
// moved together.
template <class T, int N>
__device__ __forceinline__ bool holds_packs(const Segment& s, Index place, Index length) {
  return s.offset <= place && place + length <= s.offset + s.numel &&
         moves_whole<T, N>(s, place - s.offset);
}

// The segment in which a warp's tile begins: looked up once a tile. To be used by all lanes of a
// warp together, for tiles in ascending order.
template <class T, int N>
struct TileSegment {
  Index index = -1;  // the first segment that ends after the tile's begin; perhaps none does
  bool whole;        // the tile lies in `segment`, and all its packs of N may be moved together
  Segment segment;   // where there is one

  // `together`: the flat vectors' own addresses allow whole packs.
  __device__ __forceinline__ void enter(const SegmentTable& table, Index first, Index length,
                                        bool together) {
    if (index < 0 || (index < table.count && segment.offset + segment.numel <= first)) {
      index = table.first_ending_after(first, index + 1);
      if (index < table.count) segment = table.segments[index];
    }
    whole = together && index < table.count && holds_packs<T, N>(segment, first, length);
  }
};

// Calls body(Width<W>, segment, first element inside it, flat index) for the parts of segments in
// the pack [flat, flat + N): once with W = N where the pack lies in one segment and every address
// is aligned for it, else with W = 1 for each element that a segment covers. `at`, one of the two
// above, stands at `flat` or before it. `together`: the flat vectors' own addresses allow whole
// packs.
template <class T, int N, class Place, class Body>
__device__ __forceinline__ void visit_pack(const SegmentTable& table, Place& at, Index flat,
                                           Index end, bool together, Body&& body) {
  at.advance(table, flat);
  if (at.index >= table.count) return;
  {
    const auto& s = at.found(table);
    if (together && holds_packs<T, N>(s, flat, N)) {
      return body(Width<N>{}, s, flat - s.offset, flat);
    }
  }
  const Index stop = flat + N < end ? flat + N : end;
#pragma unroll 1
  for (Index place = flat; place < stop; ++place) {
    at.advance(table, place);
    if (at.index >= table.count) return;
    const auto& s = at.found(table);
    if (s.offset <= place) body(Width<1>{}, s, place - s.offset, place);
  }
}

// How far apart a thread's packs lie within a tile: the lanes' packs stand side by side.
template <int N>
constexpr Index kPackStep = kWarp * N;

// Calls body(Width<W>, Width<U>, segment, first element inside it, flat index) for all segments,
// each warp taking a tile of U = `packs` packs a lane at a time. A tile that lies in one segment
// comes in one call, its packs kPackStep<N> elements apart; others pack by pack (U = 1), as
// visit_pack has them.
template <class T, int N, int packs, class Body>
__device__ __forceinline__ void visit_tiles(const Segments& segments, bool together, Body&& body) {
  constexpr Index kLength = packs * kPackStep<N>;
  TileSegment<T, N> at;
  for (Index tile = first_tile(); segments.begin + tile * kLength < segments.end;
       tile += tile_stride()) {
    const Index first = segments.begin + tile * kLength, flat = first + lane_of_thread() * N;
    at.enter(segments.table, first, kLength, together);
    if (at.whole) {
      body(Width<N>{}, Width<packs>{}, at.segment, flat - at.segment.offset, flat);
      continue;
    }
    CurrentSegment own{static_cast<int>(at.index), at.segment};
#pragma unroll 1
    for (int u = 0; u < packs && flat + u * kPackStep<N> < segments.end; ++u) {
      visit_pack<T, N>(segments.table, own, flat + u * kPackStep<N>, segments.end, together,
                       [&](auto width, const Segment& s, Index inside, Index place) {
        body(width, Width<1>{}, s, inside, place);
      });
    }
  }
}

// U packs of W elements of a parameter or a gradient.
template <int W, int U, class T>
__device__ __forceinline__ void load_elements(DType dtype, const void* from, T (&out)[U][W]) {
  if constexpr (W == 1) {
    static_assert(U == 1);
    out[0][0] = load_one<T>(dtype, from);
  } else {
    Bits<W, sizeof(T), U> bits;
    bits.load(dtype, from, kPackStep<W>);
    bits.convert(dtype, out);
  }
}

template <int W, int U, bool keep, class T>
__device__ __forceinline__ void store_elements(DType dtype, void* to, T (&values)[U][W]) {
  if constexpr (W == 1) {
    const T stored = store_one(dtype, to, values[0][0]);
    if (keep) values[0][0] = stored;
  } else {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      store_pack<W, keep>(dtype, byte_offset(to, u * kPackStep<W> * size_of(dtype)), values[u]);
    }
  }
}

}  // namespace fuse_ext::cuda
