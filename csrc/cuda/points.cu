// Passes over parameters, gradients and single flat vectors: norms, moves, blends, copies.
//
// Bytes an element (all fp32):
//   grad_stats    reads grad, and the direction where there is one: 4 or 8
//   lbfgs_move    reads the origin (saving: param) and the direction, writes param (saving: and
//                 the origin): 12 or 16
//   fuse_blend    reads param, origin and direction, writes param and direction: 20
//   grad_gather, grad_scatter: 8
#include "rows.cuh"

namespace fuse_ext::cuda {
namespace {

constexpr int kPack = 4;
// Packs a lane: so many bytes under way together, of one vector alone, hide the memory's latency.
template <class T>
constexpr int kPacks = sizeof(T) == 4 ? 4 : 2;

// The segments from a multiple of kPack on, so that packs of flat vectors are aligned.
Segments from_whole_pack(Segments segments) {
  segments.begin -= segments.begin % kPack;
  return segments;
}

template <class T>
Index blocks_over(Index numel) {
  constexpr Index kLength = kPacks<T> * kPackStep<kPack>;
  return blocks_for((numel + kLength - 1) / kLength, kWarps, kMostLightBlocks);
}
template <class T>
Index blocks_over(const Segments& segments) {
  return blocks_over<T>(segments.end - segments.begin);
}

// For arithmetic in float, float64 rows are taken element by element.
template <class T>
bool rows_move_whole(const Ring& ring) {
  return rows_are_aligned(ring) && size_of(ring.row_dtype) <= static_cast<int>(sizeof(T));
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 5 : 2)
    stats_kernel(const Segments segments, const Ring ring, bool has_direction, bool together,
                 T sign, double* stats, Workspace workspace) {
  FUSE_SHARED(double, shared);
  const GridSums sums(shared, kGradStats, 1, whole_grid(workspace));
  Row direction{};
  if (has_direction) direction = open_s_row(ring);
  double slope = 0, square = 0, absolute = 0, penalty = 0;
  T largest = 0;
  visit_tiles<T, kPack, kPacks<T>>(
      segments, together, [&](auto width, auto packs, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value, U = decltype(packs)::value;
    T g[U][W];
    load_elements<W, U>(s.grad_dtype, grad_at(s, first), g);
    T sum_gg = 0, sum_abs = 0;
    const bool decays = s.weight_decay != 0.0;
    if (decays) {
      T x[U][W], sum_xx = 0;
      load_elements<W, U>(s.param_dtype, param_at(s, first), x);
      const T decay = static_cast<T>(s.weight_decay);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int k = 0; k < W; ++k) {
          g[u][k] = sign * g[u][k] + decay * x[u][k];
          sum_xx += x[u][k] * x[u][k];
        }
      }
      penalty += 0.5 * s.weight_decay * static_cast<double>(sum_xx);
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int k = 0; k < W; ++k) g[u][k] *= sign;
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const T magnitude = magnitude_of(g[u][k]);
        sum_gg += g[u][k] * g[u][k];
        sum_abs += magnitude;
        largest = larger(largest, magnitude);
      }
    }
    square += static_cast<double>(sum_gg);
    absolute += static_cast<double>(sum_abs);
    if (has_direction) {
      T p[U][W], sum_gp = 0;
      load_row<W, U>(direction, at, p);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int k = 0; k < W; ++k) sum_gp += g[u][k] * p[u][k];
      }
      slope += static_cast<double>(sum_gp);
    }
  });
  slope = warp_sum(slope);
  square = warp_sum(square);
  absolute = warp_sum(absolute);
  penalty = warp_sum(penalty);
  const double maximum = static_cast<double>(warp_max(largest));
  if (lane_of_thread() == 0) {
    sums.cell(kGradDotDirection) = slope;
    sums.cell(kGradSq) = square;
    sums.cell(kGradAbsSum) = absolute;
    sums.cell(kPenalty) = penalty;
    sums.cell(kGradAbsMax) = maximum;
  }
  sums.finish([&](int column, double total) { stats[column] = total; });
}

// Blocks a multiprocessor; for sm_100 ptxas 13.0 spills registers with more than four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMoveBlocks = 4;
#else
constexpr int kMoveBlocks = 6;
#endif

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? kMoveBlocks : 2)
    move_kernel(const Segments segments, T* origin, const Ring ring, bool together, double step,
                bool save, double* control) {
  if (control != nullptr) {
    const MoveOrder order = move_order(ring.scalars, control);
    if (blockIdx.x == 0 && threadIdx.x == 0) note_move(ring.scalars, control);
    if (order.stay) return;
    step = order.step, save = order.save;
  }
  const Row direction = open_s_row(ring);
  const T length = static_cast<T>(step);
  visit_tiles<T, kPack, kPacks<T>>(
      segments, together, [&](auto width, auto packs, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value, U = decltype(packs)::value;
    T x[U][W], p[U][W];
    if (save) {
      load_elements<W, U>(s.param_dtype, param_at(s, first), x);
    } else {
      load_elements<W, U>(dtype_of<T>(), origin + at, x);
    }
    if (step != 0.0) load_row<W, U>(direction, at, p);
    if (save) store_elements<W, U, false>(dtype_of<T>(), origin + at, x);
    if (step != 0.0) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int k = 0; k < W; ++k) x[u][k] += length * p[u][k];
      }
    } else if (save) {
      return;
    }
    store_elements<W, U, false>(s.param_dtype, param_at(s, first), x);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    blend_kernel(const Segments segments, const T* origin, const Ring ring, bool together,
                 double theta, double step, Workspace workspace) {
  FUSE_SHARED(double, shared);
  const GridSums sums(shared, 1, 0, whole_grid(workspace));
  const Row direction = open_s_row(ring);
  const T adam_share = static_cast<T>(theta), lbfgs_share = static_cast<T>(1.0 - theta);
  const T lbfgs_step = static_cast<T>(step);
  const bool mostly_adam = theta > 0.5;
  const Index numel = ring.numel;
  double square = 0;
  const auto blended = [&](T x, T from, T direction_of) {
    const T goal = from + lbfgs_step * direction_of, gap = goal - x;
    // Exact at theta = 0 and 1, and where both iterates agree.
    return mostly_adam ? x + lbfgs_share * gap : goal - adam_share * gap;
  };
  // A lane's packs lie in blocks of an 8-bit row each. Lanes beyond the end stay with their warp.
  static_assert(kPackStep<kPack> == kScaleBlock);
  constexpr Index kLength = kPacks<T> * kScaleBlock;
  TileSegment<T, kPack> in;
  for (Index tile = first_tile(); tile * kLength < numel; tile += tile_stride()) {
    const Index begin = tile * kLength + lane_of_thread() * kPack;
    in.enter(segments.table, tile * kLength, kLength, together);
    T p[kPacks<T>][kPack], taken[kPacks<T>][kPack] = {};
    if (in.whole) {
      T x[kPacks<T>][kPack], from[kPacks<T>][kPack];
      void* const param = param_at(in.segment, begin - in.segment.offset);
      load_elements<kPack, kPacks<T>>(in.segment.param_dtype, param, x);
      load_elements<kPack, kPacks<T>>(dtype_of<T>(), origin + begin, from);
      load_row<kPack, kPacks<T>>(direction, begin, p);
#pragma unroll
      for (int u = 0; u < kPacks<T>; ++u) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) x[u][k] = blended(x[u][k], from[u][k], p[u][k]);
      }
      store_elements<kPack, kPacks<T>, true>(in.segment.param_dtype, param, x);
#pragma unroll
      for (int u = 0; u < kPacks<T>; ++u) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) taken[u][k] = x[u][k] - from[u][k];
      }
    } else {
      CurrentSegment own{static_cast<int>(in.index), in.segment};
#pragma unroll
      for (int u = 0; u < kPacks<T>; ++u) {
        const Index flat = begin + u * kScaleBlock;
        load_row_pack<kPack>(direction, flat, numel, together && flat + kPack <= numel, p[u]);
        visit_pack<T, kPack>(segments.table, own, flat, numel, together,
                             [&](auto width, const Segment& s, Index first, Index at) {
          constexpr int W = decltype(width)::value;
          T x[1][W], from[1][W];
          load_elements<W, 1>(s.param_dtype, param_at(s, first), x);
          load_elements<W, 1>(dtype_of<T>(), origin + at, from);
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            const int e = W == 1 ? 0 : k;
            if (W == kPack || flat + k == at) x[0][e] = blended(x[0][e], from[0][e], p[u][k]);
          }
          store_elements<W, 1, true>(s.param_dtype, param_at(s, first), x);
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            const int e = W == 1 ? 0 : k;
            if (W == kPack || flat + k == at) taken[u][k] = x[0][e] - from[0][e];
          }
        });
      }
    }
    T sum = 0;
#pragma unroll
    for (int u = 0; u < kPacks<T>; ++u) {
      const Index flat = begin + u * kScaleBlock;
      store_row_pack<kPack>(direction, flat, numel, together && flat + kPack <= numel, taken[u]);
#pragma unroll
      for (int k = 0; k < kPack; ++k) sum += taken[u][k] * taken[u][k];
    }
    square += static_cast<double>(sum);
  }
  square = warp_sum(square);
  if (lane_of_thread() == 0) sums.cell(0) = square;
  sums.finish([&](int, double total) { ring.scalars[kDirectionSq] = total; });
}

template <class T, bool to_flat>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 2)
    copy_kernel(const Segments segments, T* flat, bool together) {
  visit_tiles<T, kPack, kPacks<T>>(
      segments, together, [&](auto width, auto packs, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value, U = decltype(packs)::value;
    void* const grad = const_cast<void*>(grad_at(s, first));
    T values[U][W];
    if constexpr (to_flat) {
      load_elements<W, U>(s.grad_dtype, grad, values);
      store_elements<W, U, false>(dtype_of<T>(), flat + at, values);
    } else {
      load_elements<W, U>(dtype_of<T>(), flat + at, values);
      store_elements<W, U, false>(s.grad_dtype, grad, values);
    }
  });
}

template <bool to_flat>
void copy(const Segments& segments, DType dtype, void* flat, void* stream) {
  const Segments all = from_whole_pack(segments);
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FUSE_LAUNCH((copy_kernel<T, to_flat>), blocks_over<T>(all), 0, stream, all,
                static_cast<T*>(flat), is_aligned(flat, 16));
  });
}

}  // namespace

void launch_grad_stats(const Segments& segments, DType dtype, bool maximize, const Ring* ring,
                       double* stats, Workspace workspace, void* stream) {
  const Segments all = from_whole_pack(segments);
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FUSE_LAUNCH((stats_kernel<T>), blocks_over<T>(all), sums_bytes(kGradStats), stream, all,
                ring != nullptr ? *ring : Ring{}, ring != nullptr,
                ring == nullptr || rows_move_whole<T>(*ring), maximize ? T(-1) : T(1), stats,
                workspace);
  });
}

void launch_lbfgs_move(const Segments& segments, DType dtype, void* origin, const Ring& ring,
                       double step, bool save, double* control, void* stream) {
  const Segments all = from_whole_pack(segments);
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FUSE_LAUNCH((move_kernel<T>), blocks_over<T>(all), 0, stream, all, static_cast<T*>(origin),
                ring, rows_move_whole<T>(ring) && is_aligned(origin, 16), step, save, control);
  });
}

void launch_fuse_blend(const Segments& segments, DType dtype, const void* origin, const Ring& ring,
                       double theta, double step, Workspace workspace, void* stream) {
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FUSE_LAUNCH((blend_kernel<T>), blocks_over<T>(ring.numel), sums_bytes(1), stream, segments,
                static_cast<const T*>(origin), ring,
                rows_move_whole<T>(ring) && is_aligned(origin, 16), theta, step, workspace);
  });
}

void launch_grad_gather(const Segments& segments, DType dtype, void* flat, void* stream) {
  copy<true>(segments, dtype, flat, stream);
}

void launch_grad_scatter(const Segments& segments, DType dtype, const void* flat, void* stream) {
  copy<false>(segments, dtype, const_cast<void*>(flat), stream);
}

}  // namespace fuse_ext::cuda
