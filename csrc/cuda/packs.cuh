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

__host__ __device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<unsigned>(bytes) == 0;
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

// The bits of N elements of a dtype of at most `widest` bytes, known only at run time. Loading
// apart from converting lets several loads be under way together.
template <int N, int widest>
struct Bits {
  std::uint32_t words[N * widest / 4];

  __device__ __forceinline__ void load(DType dtype, const void* from) {
    if (size_of(dtype) == 2) {
      load_words<2 * N>(from, words);
    } else if (widest == 4 || size_of(dtype) == 4) {
      load_words<4 * N>(from, words);
    } else if constexpr (widest == 8) {
      load_words<8 * N>(from, words);
    }
  }

  template <class T>
  __device__ __forceinline__ void convert(DType dtype, T (&out)[N]) const {
    if (size_of(dtype) == 2) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const auto half = static_cast<std::uint16_t>(words[k / 2] >> (16 * (k % 2)));
        out[k] = dtype == DType::bf16 ? fuse_ext::load<T>(BFloat16{half})
                                      : fuse_ext::load<T>(Float16{half});
      }
    } else if (widest == 4 || size_of(dtype) == 4) {
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = static_cast<T>(bits_float(words[k]));
    } else if constexpr (widest == 8) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        out[k] = static_cast<T>(words_double(words[2 * k], words[2 * k + 1]));
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
        std::uint16_t bits;
        if (dtype == DType::bf16) {
          BFloat16 stored;
          store(&stored, values[k + half]);
          if (keep) values[k + half] = fuse_ext::load<T>(stored);
          bits = stored.bits;
        } else {
          Float16 stored;
          store(&stored, values[k + half]);
          if (keep) values[k + half] = fuse_ext::load<T>(stored);
          bits = stored.bits;
        }
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
    default: {
      const auto half = load_global<std::uint16_t>(from);
      return dtype == DType::bf16 ? fuse_ext::load<T>(BFloat16{half})
                                  : fuse_ext::load<T>(Float16{half});
    }
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
    case DType::bf16: {
      BFloat16 stored;
      store(&stored, value);
      store_global(to, stored.bits);
      return fuse_ext::load<T>(stored);
    }
    default: {
      Float16 stored;
      store(&stored, value);
      store_global(to, stored.bits);
      return fuse_ext::load<T>(stored);
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

// Calls body(Width<W>, segment, first element inside it, flat index) for the parts of segments in
// the pack [flat, flat + N): once with W = N where the pack lies in one segment and every address
// is aligned for it, else with W = 1 for each element that a segment covers. `together`: the flat
// vectors' own addresses allow the former.
template <class T, int N, class Body>
__device__ __forceinline__ void visit_pack(const SegmentTable& table, Index flat, Index end,
                                           bool together, Body&& body) {
  Index i = table.first_ending_after(flat);
  if (i >= table.count) return;
  {
    const Segment s = table.segments[i];
    if (together && s.offset <= flat && flat + N <= s.offset + s.numel &&
        moves_whole<T, N>(s, flat - s.offset)) {
      return body(Width<N>{}, s, flat - s.offset, flat);
    }
  }
  const Index stop = flat + N < end ? flat + N : end;
#pragma unroll 1
  for (Index at = flat; at < stop; ++at) {
    while (i < table.count && table.segments[i].offset + table.segments[i].numel <= at) ++i;
    if (i >= table.count) return;
    const Segment s = table.segments[i];
    if (s.offset <= at) body(Width<1>{}, s, at - s.offset, at);
  }
}

// W elements of a parameter or a gradient.
template <int W, class T>
__device__ __forceinline__ void load_elements(DType dtype, const void* from, T (&out)[W]) {
  if constexpr (W == 1) {
    out[0] = load_one<T>(dtype, from);
  } else {
    Bits<W, sizeof(T)> bits;
    bits.load(dtype, from);
    bits.convert(dtype, out);
  }
}

template <int W, bool keep, class T>
__device__ __forceinline__ void store_elements(DType dtype, void* to, T (&values)[W]) {
  if constexpr (W == 1) {
    const T stored = store_one(dtype, to, values[0]);
    if (keep) values[0] = stored;
  } else {
    store_pack<W, keep>(dtype, to, values);
  }
}

// The effective gradient g = sign * grad + weight_decay * param of a pack; zero where no segment
// is. Stays in registers: no element is reached by a run-time index.
template <class T, int N>
__device__ __forceinline__ void load_gradient(const SegmentTable& table, Index flat, Index end,
                                              T sign, T (&g)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) g[k] = T(0);
  visit_pack<T, N>(table, flat, end, true,
                   [&](auto width, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value;
    T value[W], param[W];
    load_elements<W>(s.grad_dtype, grad_at(s, first), value);
    const bool decays = s.weight_decay != 0.0;
    if (decays) load_elements<W>(s.param_dtype, param_at(s, first), param);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      value[k] *= sign;
      if (decays) value[k] += static_cast<T>(s.weight_decay) * param[k];
    }
    if constexpr (W == N) {
#pragma unroll
      for (int k = 0; k < N; ++k) g[k] = value[k];
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) g[k] = flat + k == at ? value[0] : g[k];
    }
  });
}

// max |x| over the parameters in a pack.
template <class T, int N>
__device__ __forceinline__ T largest_param(const SegmentTable& table, Index flat, Index end) {
  T largest = 0;
  visit_pack<T, N>(table, flat, end, true, [&](auto width, const Segment& s, Index first, Index) {
    constexpr int W = decltype(width)::value;
    T x[W];
    load_elements<W>(s.param_dtype, param_at(s, first), x);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const T magnitude = x[k] < T(0) ? -x[k] : x[k];
      largest = magnitude > largest ? magnitude : largest;
    }
  });
  return largest;
}

// Multiplies a pack by its segments' lr_scale.
template <class T, int N>
__device__ __forceinline__ void scale_by_segment(const SegmentTable& table, Index flat, Index end,
                                                 T (&values)[N]) {
  visit_pack<T, N>(table, flat, end, true, [&](auto width, const Segment& s, Index, Index at) {
    const T share = static_cast<T>(s.lr_scale);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (decltype(width)::value == N || flat + k == at) values[k] *= share;
    }
  });
}

}  // namespace fuse_ext::cuda
