// The two passes of an L-BFGS iteration over the history.
//
// Bytes an element for float32 gradients, n pairs and rows of r bytes an element (4, 2 for 16-bit
// formats, 1 + 1/32 for 8-bit ones with their scales):
//   lbfgs_update     reads grad, the previous gradient, the direction and 2 n rows, writes y:
//                    8 + (2 n + 2) r
//   lbfgs_direction  reads grad and 2 n rows, writes the direction and the previous gradient:
//                    8 + (2 n + 1) r
// With a control, lbfgs_update also reads the parameters, 4 bytes more, while no pair is usable.
#include "shares.cuh"

namespace fuse_ext::cuda {
namespace {

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
