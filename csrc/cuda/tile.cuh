// A warp's tile of the flat vector in its threads' registers: of the gradient, the parameters, rows
// of the history and vectors beside it.
#pragma once

#include "rows.cuh"

namespace fuse_ext::cuda {

// a b + c with one rounding. (Contraction is off: Adam's step has the same bits everywhere.)
__device__ __forceinline__ float mul_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double mul_add(double a, double b, double c) { return fma(a, b, c); }

// How a warp's tile of the flat vector lies in its threads' registers: kPacks packs each, of as
// many elements as fill 128 bits of a row (64 for 8-bit rows, whose sums stay in registers).
template <class T, DType row>
struct Tile {
  static constexpr int kElements = sizeof(T) == 8 || size_of(row) == 8 ? 8 : 16;  // per thread
  static constexpr int kPack = row == DType::i8 ? 8 : 16 / size_of(row);
  static constexpr int kPacks = kElements / kPack;
  static constexpr Index kLength = kWarp * kElements;
  // Pairs whose rows are under way together. As long as they are as they are stored, narrow rows
  // take few registers.
  static constexpr int kBatch = size_of(row) >= 4 ? 1 : 2;

  using Values = T[kPacks][kPack];
  using Place = TileSegment<T, kPack>;

  // First flat index of this thread's u-th pack.
  static __device__ __forceinline__ Index pack(Index tile, int u) {
    return tile * kLength + (u * kWarp + lane_of_thread()) * kPack;
  }

  // The thread's share of a row, as it is stored.
  struct Stored {
    std::uint32_t words[kPacks][kPack * size_of(row) / 4];
    float scales[kPacks];

    // `whole`: the row has all the tile's elements and is aligned; else zeros stand beyond its end.
    __device__ __forceinline__ void load(const Row& from, Index tile, Index numel, bool whole) {
      constexpr int kSize = size_of(row);
#pragma unroll
      for (int u = 0; u < kPacks; ++u) {
        const Index at = pack(tile, u);
        const void* const begin = byte_offset(static_cast<const void*>(from.data), at * kSize);
        if (whole) {
          load_words<kPack * kSize>(begin, words[u]);
        } else {
#pragma unroll
          for (int k = 0; k < kPack * kSize / 4; ++k) words[u][k] = 0;
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            if (at + k < numel) put(k, byte_offset(begin, k * kSize), words[u]);
          }
        }
        if constexpr (row == DType::i8) scales[u] = at < numel ? scale_at(from, at) : 0.0f;
      }
    }

    // The u-th pack.
    __device__ __forceinline__ void decode(int u, T (&out)[kPack]) const {
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        if constexpr (row == DType::i8) {
          out[k] = static_cast<T>(scales[u]) * signed_byte<T>(words[u][k / 4], k % 4);
        } else if constexpr (size_of(row) == 2) {
          const auto bits = static_cast<std::uint16_t>(words[u][k / 2] >> (16 * (k % 2)));
          out[k] = half_value<T>(row, bits);
        } else if constexpr (size_of(row) == 4) {
          out[k] = static_cast<T>(bits_float(words[u][k]));
        } else {
          out[k] = static_cast<T>(words_double(words[u][2 * k], words[u][2 * k + 1]));
        }
      }
    }

   private:
    static __device__ __forceinline__ void put(int k, const void* from, std::uint32_t* to) {
      if constexpr (row == DType::i8) {
        to[k / 4] |= static_cast<std::uint32_t>(load_global<std::uint8_t>(from)) << (8 * (k % 4));
      } else if constexpr (size_of(row) == 2) {
        to[k / 2] |= static_cast<std::uint32_t>(load_global<std::uint16_t>(from)) << (16 * (k % 2));
      } else {
        load_words<size_of(row)>(from, to + k * size_of(row) / 4);
      }
    }
  };

  static __device__ __forceinline__ void load(const Row& from, Index tile, Index numel, bool whole,
                                              Values& out) {
    Stored stored;
    stored.load(from, tile, numel, whole);
#pragma unroll
    for (int u = 0; u < kPacks; ++u) stored.decode(u, out[u]);
  }

  // A vector of T.
  static __device__ __forceinline__ void load(const T* from, Index tile, Index numel, bool whole,
                                              Values& out) {
    if (whole) {
      return load_elements<kPack, kPacks>(dtype_of<T>(), from + pack(tile, 0), out);
    }
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const Index at = pack(tile, u) + k;
        out[u][k] = at < numel ? load_global<T>(from + at) : T(0);
      }
    }
  }

  // The values become what was stored, or what would be without `writes`.
  static __device__ __forceinline__ void store(const Row& to, Index tile, Index numel, bool whole,
                                               Values& values, bool writes = true) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      store_row_pack<kPack>(to, pack(tile, u), numel, whole, values[u], writes);
    }
  }

  // Calls body(Width<W>, Width<U>, segment, first element inside it, u, k) for what segments cover
  // of the tile: U packs of W elements, the first one's place in Values being [u][k].
  template <class Body>
  static __device__ __forceinline__ void visit(const SegmentTable& table, const Place& place,
                                               Index tile, Index numel, Body&& body) {
    if (place.whole) {
      return body(Width<kPack>{}, Width<kPacks>{}, place.segment,
                  pack(tile, 0) - place.segment.offset, 0, 0);
    }
    SegmentPlace at{place.index};
#pragma unroll 1
    for (int u = 0; u < kPacks; ++u) {
      const Index flat = pack(tile, u);
      visit_pack<T, kPack>(table, at, flat, numel, true,
                           [&](auto width, const Segment& s, Index inside, Index element) {
        body(width, Width<1>{}, s, inside, u, static_cast<int>(element - flat));
      });
    }
  }

  // The effective gradient g = sign * grad + weight_decay * param; zero where no segment is.
  static __device__ __forceinline__ void gradient(const SegmentTable& table, const Place& place,
                                                  Index tile, Index numel, T sign, Values& g) {
    if (!place.whole) {
#pragma unroll
      for (int u = 0; u < kPacks; ++u) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) g[u][k] = T(0);
      }
    }
    visit(table, place, tile, numel,
          [&](auto width, auto packs, const Segment& s, Index first, int u, int k) {
      constexpr int W = decltype(width)::value, U = decltype(packs)::value;
      T value[U][W], param[U][W];
      load_elements<W, U>(s.grad_dtype, grad_at(s, first), value);
      const bool decays = s.weight_decay != 0.0;
      if (decays) load_elements<W, U>(s.param_dtype, param_at(s, first), param);
#pragma unroll
      for (int v = 0; v < U; ++v) {
#pragma unroll
        for (int e = 0; e < W; ++e) {
          value[v][e] *= sign;
          if (decays) value[v][e] += static_cast<T>(s.weight_decay) * param[v][e];
        }
      }
      put(value, u, k, g);
    });
  }

  // max |x| over the parameters.
  static __device__ __forceinline__ T largest_param(const SegmentTable& table, const Place& place,
                                                    Index tile, Index numel) {
    T largest = 0;
    visit(table, place, tile, numel,
          [&](auto width, auto packs, const Segment& s, Index first, int, int) {
      constexpr int W = decltype(width)::value, U = decltype(packs)::value;
      T x[U][W];
      load_elements<W, U>(s.param_dtype, param_at(s, first), x);
#pragma unroll
      for (int v = 0; v < U; ++v) {
#pragma unroll
        for (int e = 0; e < W; ++e) largest = larger(largest, magnitude_of(x[v][e]));
      }
    });
    return largest;
  }

  // Multiplies by the segments' lr_scale.
  static __device__ __forceinline__ void scale_by_segment(const SegmentTable& table,
                                                          const Place& place, Index tile,
                                                          Index numel, Values& values) {
    visit(table, place, tile, numel,
          [&](auto width, auto packs, const Segment& s, Index, int u, int k) {
      constexpr int W = decltype(width)::value, U = decltype(packs)::value;
      const T share = static_cast<T>(s.lr_scale);
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          if ((U == kPacks && W == kPack) || (v == u && (W == kPack || e == k))) {
            values[v][e] *= share;
          }
        }
      }
    });
  }

 private:
  // U packs of W elements to their place; no register is reached by a run-time index.
  template <int U, int W>
  static __device__ __forceinline__ void put(const T (&from)[U][W], int u, int k, Values& to) {
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const T value = from[U == kPacks ? v : 0][W == kPack ? e : 0];
        if ((U == kPacks && W == kPack) || (v == u && (W == kPack || e == k))) to[v][e] = value;
      }
    }
  }
};

template <class T, int kPacks, int kPack>
__device__ __forceinline__ T dot(const T (&a)[kPacks][kPack], const T (&b)[kPacks][kPack]) {
  T sum = 0;
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
#pragma unroll
    for (int k = 0; k < kPack; ++k) sum = mul_add(a[u][k], b[u][k], sum);
  }
  return sum;
}

}  // namespace fuse_ext::cuda
