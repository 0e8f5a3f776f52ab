// The two passes of an L-BFGS iteration over the history, and the recursion between them.
//
// Bytes an element for float32 gradients, n pairs and rows of r bytes an element (4, 2 for 16-bit
// formats, 1 + 1/32 for 8-bit ones with their scales):
//   lbfgs_update     reads grad, the previous gradient, the direction and 2 n rows, writes y:
//                    8 + (2 n + 2) r
//   lbfgs_direction  reads grad and 2 n rows, writes the direction and the previous gradient:
//                    8 + (2 n + 1) r
// lbfgs_two_loop and lbfgs_decide touch scalars only. With a control, lbfgs_update also reads the
// parameters, 4 bytes more, while no pair is usable.
#include "rows.cuh"

namespace fuse_ext::cuda {
namespace {

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
    Index i = place.index;
#pragma unroll 1
    for (int u = 0; u < kPacks; ++u) {
      const Index flat = pack(tile, u);
      visit_pack<T, kPack>(table, i, flat, numel, true,
                           [&](auto width, const Segment& s, Index first, Index at) {
        body(width, Width<1>{}, s, first, u, static_cast<int>(at - flat));
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

// Blocks that must fit onto a multiprocessor together, which bounds the registers of a thread.
template <class T, DType row>
constexpr int kBlocksAtOnce = sizeof(T) == 4 ? 3 : 2;

// How a pass is divided: a block has tiles of the vector and, where these alone would occupy few
// multiprocessors, a slice of the pairs.
struct Shares {
  int slices;
  int columns;  // blocks of a slice
  int pairs;    // of a slice, at most
  int warps;    // of a block that take part
};

// Doubles for the three sums of lbfgs_direction, up to where vectors may begin that move as packs.
__host__ __device__ __forceinline__ Index direction_sums(int columns) {
  return ((columns + kGroups) * Index{3} + 1) / 2 * 2;
}

// Which share a block has.
struct Share {
  int slice, column;
  Index begin, end;  // ages of its pairs
  Index first_slot;  // of the newest of them

  __device__ __forceinline__ Share(const Shares& shares, const RingPosition& ring)
      : slice(static_cast<int>(blockIdx.x) / shares.columns),
        column(static_cast<int>(blockIdx.x) % shares.columns) {
    const Index length = (ring.count + shares.slices - 1) / shares.slices;
    begin = slice * length < ring.count ? slice * length : ring.count;
    end = begin + length < ring.count ? begin + length : ring.count;
    first_slot = ring.at_age(begin);
  }
};

template <class T>
struct PassArguments {
  Segments segments;
  Ring ring;
  T* grad_prev;  // may be null: the open slot's Y row
  T sign;
  bool flag;     // form_pair, or whether directions are scaled by segment
  bool aligned;  // rows and grad_prev start where whole packs may
  Shares shares;
  double* control;
  Workspace workspace;
};

// Counters of slices, kGroups + 1 each, and behind them one for each column of blocks.
constexpr int kMostSlices = 64;
static_assert(kMostSlices * (kGroups + 1) + kFill <= kCounters);
template <class T>
__device__ __forceinline__ unsigned* counter_of_column(const PassArguments<T>& a, int column) {
  return a.workspace.counters + kMostSlices * (kGroups + 1) + column;
}

// Calls add(age, S row, Y row), the rows as they are stored, for the pairs of a share.
template <class Pass, DType row, class Add>
__device__ __forceinline__ void for_each_pair(const Ring& of, const RingPosition& ring,
                                              const Share& share, Index tile, bool whole,
                                              Add&& add) {
  typename Pass::Stored s_rows[Pass::kBatch], y_rows[Pass::kBatch];
  Index slot = share.first_slot;
#pragma unroll 1
  for (Index age = share.begin; age < share.end; age += Pass::kBatch) {
#pragma unroll
    for (int b = 0; b < Pass::kBatch; ++b) {
      if (b > 0 && age + b >= share.end) break;
      s_rows[b].load(row_of(of, row, 0, slot), tile, of.numel, whole);
      y_rows[b].load(row_of(of, row, 1, slot), tile, of.numel, whole);
      slot = ring.older(slot);
    }
#pragma unroll
    for (int b = 0; b < Pass::kBatch; ++b) {
      if (b > 0 && age + b >= share.end) break;
      add(age + b, s_rows[b], y_rows[b]);
    }
  }
}

// The sums of a share are four arrays (two without a pair to form: g.S, g.Y, y.S, y.Y) of its pairs
// and, in the first slice, of the open slot; with a control the gradient's norms follow.
template <class T, DType row>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, row>)
    update_kernel(const PassArguments<T> a) {
  using Pass = Tile<T, row>;
  FUSE_SHARED(double, shared);
  const LbfgsScalars state = a.ring.scalars;
  const RingPosition ring(state);
  const Index numel = a.ring.numel;
  const bool decides = a.control != nullptr;
  const bool form_pair = decides ? a.control[kPairStep] != 0.0 : a.flag;
  const bool first_steps = decides && (ring.count == 0 || usable_pairs(state, 1) == 0);
  const Share share(a.shares, ring);
  const bool leads = share.slice == 0;
  const int pairs = static_cast<int>(share.end - share.begin), places = pairs + 1;
  const int arrays = form_pair ? 4 : 2, dots = arrays * places, lane = lane_of_thread();
  const bool has_norms = decides && leads;
  const int width = dots + (has_norms ? kNorms : 0);
  const Index most_width = 4 * (a.shares.pairs + 1) + kNorms;
  const Team team{static_cast<unsigned>(share.column), static_cast<unsigned>(a.shares.columns),
                  a.workspace.partials + share.slice * (a.shares.columns + kGroups) * most_width,
                  a.workspace.counters + share.slice * (kGroups + 1)};
  const GridSums sums(shared, width, has_norms ? kLargestNorms : 0, team, a.shares.warps);
  T largest = 0, largest_x = 0;
  // One lane for each of the four arrays.
  const auto add_dots = [&](int place, T gs, T gy, T ys, T yy) {
    const T sum = warp_sum_of_four(gs, gy, ys, yy);
    if (lane < arrays) sums.cell(lane * places + place) += static_cast<double>(sum);
  };
  // Without a vector of its own the previous gradient lies where y belongs: y may be stored when
  // all slices have read it, by the last one.
  const bool stores_late = a.shares.slices > 1 && a.grad_prev == nullptr;
  const Row s_open = row_of(a.ring, row, 0, ring.open), y_open = row_of(a.ring, row, 1, ring.open);
  typename Pass::Values y{};
  typename Pass::Place place;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = a.shares.warps;
  const Index first = static_cast<Index>(share.column) * warps + warp;
  for (Index tile = first; warp < warps && tile * Pass::kLength < numel;
       tile += static_cast<Index>(a.shares.columns) * warps) {
    const bool whole = a.aligned && (tile + 1) * Pass::kLength <= numel;
    place.enter(a.segments.table, tile * Pass::kLength, Pass::kLength, true);
    typename Pass::Values g;
    Pass::gradient(a.segments.table, place, tile, numel, a.sign, g);
    if (has_norms) {
      T magnitudes = 0;
#pragma unroll
      for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
        for (int k = 0; k < Pass::kPack; ++k) {
          magnitudes += magnitude_of(g[u][k]);
          largest = larger(largest, magnitude_of(g[u][k]));
        }
      }
      const T sum = warp_sum_of_four(dot(g, g), magnitudes, T(0), T(0));
      if (lane < kNorms - kLargestNorms) sums.cell(dots + lane) += static_cast<double>(sum);
    }
    if (first_steps && leads) {
      const T here = Pass::largest_param(a.segments.table, place, tile, numel);
      largest_x = larger(largest_x, here);
    }
    if (form_pair) {
      if (a.grad_prev != nullptr) {
        Pass::load(a.grad_prev, tile, numel, whole, y);
      } else {
        Pass::load(y_open, tile, numel, whole, y);
      }
#pragma unroll
      for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
        for (int k = 0; k < Pass::kPack; ++k) y[u][k] = g[u][k] - y[u][k];
      }
      Pass::store(y_open, tile, numel, whole, y, leads && !stores_late);
      if (leads) {
        typename Pass::Values s_values;
        Pass::load(s_open, tile, numel, whole, s_values);
        add_dots(pairs, dot(g, s_values), dot(g, y), dot(y, s_values), dot(y, y));
      }
    }
    for_each_pair<Pass, row>(a.ring, ring, share, tile, whole,
                             [&](Index age, const auto& s_row, const auto& y_row) {
      T sums_of[4] = {};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int u = 0; u < Pass::kPacks; ++u) {
          T values[Pass::kPack];
          (side == 0 ? s_row : y_row).decode(u, values);
#pragma unroll
          for (int k = 0; k < Pass::kPack; ++k) {
            sums_of[side] = mul_add(g[u][k], values[k], sums_of[side]);
            sums_of[2 + side] = mul_add(y[u][k], values[k], sums_of[2 + side]);
          }
        }
      }
      add_dots(static_cast<int>(age - share.begin), sums_of[0], sums_of[1], sums_of[2], sums_of[3]);
    });
  }
  if (has_norms && warp < warps) {
    largest = warp_max(largest);
    largest_x = warp_max(largest_x);
    static_assert(kGradSquare + 2 == kGradLargest && kGradLargest + 1 == kParamLargest);
    if (lane == 0) {
      sums.cell(dots + 2) = static_cast<double>(largest);
      sums.cell(dots + 3) = static_cast<double>(largest_x);
    }
  }
  const bool last = sums.finish([&](int column, double total) {
    if (column >= dots) {
      const int norm = kGradSquare + column - dots;
      if (norm != kParamLargest || first_steps) a.control[norm] = total;
      return;
    }
    const int array = column / places, at = column % places;
    const bool opened = at == pairs;
    if (opened && !(leads && form_pair)) return;
    const Index slot = opened ? ring.open : ring.at_age(share.begin + at);
    state.array(kGradS)[array * ring.slots + slot] = total;
    if (opened && array == 3) state[kYDotY] = total;
  });
  static_cast<void>(last);
  if (!stores_late || !form_pair) return;
  // A warp has one tile at most where there are slices, and y is still there.
  if (!is_last_to_come(counter_of_column(a, share.column), static_cast<unsigned>(a.shares.slices),
                       shared)) {
    return;
  }
  if (warp < warps && first * Pass::kLength < numel) {
    const bool whole = a.aligned && (first + 1) * Pass::kLength <= numel;
    Pass::store(y_open, first, numel, whole, y);
  }
}

template <class T, DType row>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, row>)
    direction_kernel(const PassArguments<T> a) {
  using Pass = Tile<T, row>;
  FUSE_SHARED(double, shared);
  if (a.control != nullptr && a.control[kMove] != kGo) return;
  const LbfgsScalars state = a.ring.scalars;
  const RingPosition ring(state);
  const Index numel = a.ring.numel;
  const int lane = lane_of_thread();
  const Share share(a.shares, ring);
  const Team team{static_cast<unsigned>(share.column), static_cast<unsigned>(a.shares.columns),
                  a.workspace.partials, a.workspace.counters};
  const GridSums sums(shared, 3, 1, team);
  // Behind the sums: the coefficients of S and Y rows, newest pair first.
  T* const coefs = reinterpret_cast<T*>(shared + (kWarps * 3 > kThreads ? kWarps * 3 : kThreads));
  for (Index age = share.begin + threadIdx.x; age < share.end; age += kThreads) {
    const Index slot = ring.at_age(age), at = 2 * (age - share.begin);
    coefs[at] = static_cast<T>(state.array(kCoefS)[slot]);
    coefs[at + 1] = static_cast<T>(state.array(kCoefY)[slot]);
  }
  const T coef_g = share.slice == 0 ? static_cast<T>(*state.array(kCoefG)) : T(0);
  __syncthreads();
  double slope = 0, square = 0;
  T largest = 0;
  typename Pass::Place place;
  const bool divided = a.shares.slices > 1;
  // Behind the sums' memory: what the slices give, as vectors of whole tiles.
  const Index padded = static_cast<Index>(a.shares.columns) * kWarps * Pass::kLength;
  T* const parts = reinterpret_cast<T*>(a.workspace.partials + direction_sums(a.shares.columns));
  const auto tile_of = [&](Index round) {
    return (round * a.shares.columns + share.column) * kWarps +
           static_cast<Index>(threadIdx.x / kWarp);
  };
  for (Index round = 0; round * a.shares.columns * kWarps * Pass::kLength < numel; ++round) {
    const Index tile = tile_of(round);
    const bool within = tile * Pass::kLength < numel;
    const bool whole = a.aligned && (tile + 1) * Pass::kLength <= numel;
    typename Pass::Values g, p;
    if (within) {
      place.enter(a.segments.table, tile * Pass::kLength, Pass::kLength, true);
      Pass::gradient(a.segments.table, place, tile, numel, a.sign, g);
#pragma unroll
      for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
        for (int k = 0; k < Pass::kPack; ++k) p[u][k] = coef_g * g[u][k];
      }
      for_each_pair<Pass, row>(a.ring, ring, share, tile, whole,
                               [&](Index age, const auto& s_row, const auto& y_row) {
        const Index at = 2 * (age - share.begin);
        const T coef_s = coefs[at], coef_y = coefs[at + 1];
#pragma unroll
        for (int u = 0; u < Pass::kPacks; ++u) {
          T s_values[Pass::kPack], y_values[Pass::kPack];
          s_row.decode(u, s_values);
          y_row.decode(u, y_values);
#pragma unroll
          for (int k = 0; k < Pass::kPack; ++k) {
            p[u][k] = mul_add(coef_s, s_values[k], p[u][k]);
            p[u][k] = mul_add(coef_y, y_values[k], p[u][k]);
          }
        }
      });
    }
    if (divided) {
      // One round is all there is. The slice that comes last adds up and goes on.
      if (within) {
        T* const mine = parts + share.slice * padded + Pass::pack(tile, 0);
        store_elements<Pass::kPack, Pass::kPacks, false>(dtype_of<T>(), mine, p);
      }
      if (!is_last_to_come(counter_of_column(a, share.column),
                           static_cast<unsigned>(a.shares.slices), shared)) {
        return;
      }
      if (within) {
#pragma unroll 1
        for (int slice = 0; slice < a.shares.slices; ++slice) {
          typename Pass::Values part;
          const T* const from = parts + slice * padded;
          Pass::load(from, tile, padded, true, part);
#pragma unroll
          for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
            for (int k = 0; k < Pass::kPack; ++k) {
              p[u][k] = slice == 0 ? part[u][k] : p[u][k] + part[u][k];
            }
          }
        }
      }
      // The sums' memory has been used for the counting.
      if (lane < 3) sums.cell(lane) = 0;
      __syncthreads();
    }
    if (!within) continue;
    if (a.flag) Pass::scale_by_segment(a.segments.table, place, tile, numel, p);
    Pass::store(row_of(a.ring, row, 0, ring.open), tile, numel, whole, p);
    if (a.grad_prev != nullptr) {
      if (whole) {
        store_elements<Pass::kPack, Pass::kPacks, false>(dtype_of<T>(),
                                                         a.grad_prev + Pass::pack(tile, 0), g);
      } else {
        Pass::store({a.grad_prev, nullptr, dtype_of<T>()}, tile, numel, false, g);
      }
    } else {
      Pass::store(row_of(a.ring, row, 1, ring.open), tile, numel, whole, g);
    }
    slope += static_cast<double>(dot(g, p));
    square += static_cast<double>(dot(p, p));
#pragma unroll
    for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
      for (int k = 0; k < Pass::kPack; ++k) largest = larger(largest, magnitude_of(p[u][k]));
    }
  }
  slope = warp_sum(slope);
  square = warp_sum(square);
  const double maximum = static_cast<double>(warp_max(largest));
  if (lane == 0) sums.cell(0) = slope, sums.cell(1) = square, sums.cell(2) = maximum;
  static_assert(kDirectionSq == kDirectionDotGrad + 1 && kDirectionMax == kDirectionSq + 1);
  sums.finish([&](int column, double total) { state.data[kDirectionDotGrad + column] = total; });
}

// The threads of a block.
struct Block {
  __device__ __forceinline__ Index rank() const { return static_cast<Index>(threadIdx.x); }
  __device__ __forceinline__ Index size() const { return kThreads; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// Calls work(scalars), which the threads of the block share, and after it every write is done.
// `staged`: the scalars are worked on in shared memory, as the recursion waits for every number
// that it reads.
template <bool staged, class Work>
__device__ __forceinline__ void on_scalars(LbfgsScalars scalars, double* shared, Work&& work) {
  const Block block;
  const Index size = scalar_offset(kScalarArrays, scalars.slots);
  LbfgsScalars state = scalars;
  if constexpr (staged) {
    for (Index i = block.rank(); i < size; i += block.size()) shared[i] = scalars.data[i];
    __syncthreads();
    state.data = shared;
  }
  if (!is_ring(state)) {
    if (block.rank() == 0) *scalars.array(kCoefG) = nan("");
    return;
  }
  work(state, block);
  if constexpr (staged) {
    __syncthreads();
    for (Index i = block.rank(); i < size; i += block.size()) scalars.data[i] = shared[i];
  }
}

template <bool staged>
__global__ void __launch_bounds__(kThreads, 1)
    two_loop_kernel(LbfgsScalars scalars, bool commit, double step_length, double curvature_tol) {
  FUSE_SHARED(double, shared);
  on_scalars<staged>(scalars, shared, [&](LbfgsScalars state, const Block& block) {
    if (commit) commit_pair(state, step_length, curvature_tol, block);
    two_loop(state, block);
  });
}

template <bool staged>
__global__ void __launch_bounds__(kThreads, 1)
    decide_kernel(LbfgsScalars scalars, double* control, FixedStep told, Number lr, double lr_unit,
                  Number loss) {
  FUSE_SHARED(double, shared);
  if (lr.data != nullptr) told.lr *= read(lr) / lr_unit;
  if (loss.data != nullptr) told.loss = read(loss);
  on_scalars<staged>(scalars, shared, [&](LbfgsScalars state, const Block& block) {
    decide_step(state, control, told, block);
  });
}

// Calls function with the arithmetic type and, as a tag, the rows' dtype.
template <class Function>
void with_types(DType state, DType row, Function&& function) {
  with_state_type(state, [&](auto zero) {
    switch (row) {
      case DType::f32: return function(zero, std::integral_constant<DType, DType::f32>{});
      case DType::f64: return function(zero, std::integral_constant<DType, DType::f64>{});
      case DType::bf16: return function(zero, std::integral_constant<DType, DType::bf16>{});
      case DType::f16: return function(zero, std::integral_constant<DType, DType::f16>{});
      case DType::i8: return function(zero, std::integral_constant<DType, DType::i8>{});
    }
  });
}

template <class T, DType row>
Index tiles_of(Index numel) {
  return (numel + Tile<T, row>::kLength - 1) / Tile<T, row>::kLength;
}

// Sums of lbfgs_update over so many pairs and the open slot.
Index update_width(Index pairs) { return 4 * (pairs + 1) + kNorms; }

// Slices where the vector alone makes few blocks: as many as fill the device, of at least
// kLeastPairs pairs. `most_warps` of a share, with its pairs, fit into a block.
template <class T, DType row, class Warps>
Shares shares_of(Index slots, Index numel, Warps&& most_warps) {
  const Index tiles = tiles_of<T, row>(numel), pairs = slots - 1;
  Index columns = blocks_for(tiles, kWarps), slices = kFill / columns;
  if (slices > pairs / kLeastPairs) slices = pairs / kLeastPairs;
  if (slices > kMostSlices) slices = kMostSlices;
  if (slices < 1) slices = 1;
  Index share = (pairs + slices - 1) / slices;
  Index warps = most_warps(share);
  columns = blocks_for(tiles, warps);
  if (slices > 1 && (columns * warps < tiles || columns > kFill)) {
    slices = 1, share = pairs;
    warps = most_warps(share);
    columns = blocks_for(tiles, warps);
  }
  return {static_cast<int>(slices), static_cast<int>(columns), static_cast<int>(share),
          static_cast<int>(warps)};
}

template <class T, DType row>
Shares update_shares(Index slots, Index numel) {
  // Many pairs leave shared memory for the sums of few warps.
  return shares_of<T, row>(slots, numel, [](Index pairs) {
    const Index fit = kSharedBytes / (update_width(pairs) * static_cast<Index>(sizeof(double)));
    return fit < kWarps ? fit : kWarps;
  });
}
template <class T, DType row>
Shares direction_shares(Index slots, Index numel) {
  return shares_of<T, row>(slots, numel, [](Index) { return Index{kWarps}; });
}

template <class T>
PassArguments<T> pass_arguments(const Segments& segments, bool maximize, bool flag,
                                const Ring& ring, const void* grad_prev, double* control,
                                Workspace workspace) {
  PassArguments<T> a{};
  a.control = control;
  a.segments = segments;
  a.ring = ring;
  a.grad_prev = static_cast<T*>(const_cast<void*>(grad_prev));
  a.sign = maximize ? T(-1) : T(1);
  a.flag = flag;
  a.aligned = rows_are_aligned(ring) && is_aligned(grad_prev, 16);
  a.workspace = workspace;
  return a;
}

// Bytes of the scalars where shared memory holds them, else 0.
Index staged_bytes(LbfgsScalars scalars) {
  const Index bytes =
      scalar_offset(kScalarArrays, scalars.slots) * static_cast<Index>(sizeof(double));
  return bytes <= kSharedBytes ? bytes : 0;
}

}  // namespace

std::int64_t most_slots() {
  const Index columns = kSharedBytes / static_cast<Index>(sizeof(double));
  return (columns - update_width(-1)) / (update_width(1) - update_width(0));
}

std::int64_t update_workspace_size(DType dtype, DType row_dtype, std::int64_t slots,
                                   std::int64_t numel) {
  Index size = 0;
  with_types(dtype, row_dtype, [&](auto zero, auto row) {
    const Shares shares = update_shares<decltype(zero), decltype(row)::value>(slots, numel);
    size = shares.slices * (shares.columns + kGroups) * update_width(shares.pairs);
  });
  return size;
}

std::int64_t direction_workspace_size(DType dtype, DType row_dtype, std::int64_t slots,
                                      std::int64_t numel) {
  Index size = 0;
  with_types(dtype, row_dtype, [&](auto zero, auto row) {
    using T = decltype(zero);
    using Pass = Tile<T, decltype(row)::value>;
    const Shares shares = direction_shares<T, decltype(row)::value>(slots, numel);
    const Index padded = Index{shares.columns} * kWarps * Pass::kLength;
    size = direction_sums(shares.columns);
    if (shares.slices > 1) {
      size += shares.slices * padded * static_cast<Index>(sizeof(T)) /
              static_cast<Index>(sizeof(double));
    }
  });
  return size;
}

void launch_lbfgs_update(const Segments& segments, DType dtype, bool maximize, const Ring& ring,
                         const void* grad_prev, bool form_pair, double* control,
                         Workspace workspace, void* stream) {
  with_types(dtype, ring.row_dtype, [&](auto zero, auto row) {
    using T = decltype(zero);
    constexpr DType kRow = decltype(row)::value;
    PassArguments<T> a =
        pass_arguments<T>(segments, maximize, form_pair, ring, grad_prev, control, workspace);
    const Shares shares = a.shares = update_shares<T, kRow>(ring.scalars.slots, ring.numel);
    FUSE_LAUNCH((update_kernel<T, kRow>), shares.slices * shares.columns,
                sums_bytes(update_width(shares.pairs), shares.warps), stream, a);
  });
}

void launch_lbfgs_two_loop(LbfgsScalars scalars, bool commit, double step_length,
                           double curvature_tol, void* stream) {
  const Index bytes = staged_bytes(scalars);
  if (bytes > 0) {
    FUSE_LAUNCH((two_loop_kernel<true>), 1, bytes, stream, scalars, commit, step_length,
                curvature_tol);
  } else {
    FUSE_LAUNCH((two_loop_kernel<false>), 1, 0, stream, scalars, commit, step_length,
                curvature_tol);
  }
}

void launch_lbfgs_decide(LbfgsScalars scalars, double* control, const FixedStep& told, Number lr,
                         double lr_unit, Number loss, void* stream) {
  const Index bytes = staged_bytes(scalars);
  if (bytes > 0) {
    FUSE_LAUNCH((decide_kernel<true>), 1, bytes, stream, scalars, control, told, lr, lr_unit, loss);
  } else {
    FUSE_LAUNCH((decide_kernel<false>), 1, 0, stream, scalars, control, told, lr, lr_unit, loss);
  }
}

void launch_lbfgs_direction(const Segments& segments, DType dtype, bool maximize, bool scaled,
                            const Ring& ring, void* grad_prev, const double* control,
                            Workspace workspace, void* stream) {
  with_types(dtype, ring.row_dtype, [&](auto zero, auto row) {
    using T = decltype(zero);
    constexpr DType kRow = decltype(row)::value;
    PassArguments<T> a = pass_arguments<T>(segments, maximize, scaled, ring, grad_prev,
                                           const_cast<double*>(control), workspace);
    const Shares shares = a.shares = direction_shares<T, kRow>(ring.scalars.slots, ring.numel);
    const Index coefs = Index{2} * (shares.pairs + 1) * static_cast<Index>(sizeof(T));
    FUSE_LAUNCH((direction_kernel<T, kRow>), shares.slices * shares.columns, sums_bytes(3) + coefs,
                stream, a);
  });
}

}  // namespace fuse_ext::cuda
