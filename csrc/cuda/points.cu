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

// Calls body as visit_pack does, over all segments, with each warp taking a tile at a time.
template <class T, class Body>
__device__ __forceinline__ void visit_segments(const Segments& segments, bool together,
                                               Body&& body) {
  for (Index tile = first_tile(); segments.begin + tile * kWarp * kPack < segments.end;
       tile += tile_stride()) {
    const Index flat = segments.begin + (tile * kWarp + lane_of_thread()) * kPack;
    if (flat >= segments.end) continue;
    visit_pack<T, kPack>(segments.table, flat, segments.end, together, body);
  }
}

// The segments from a multiple of kPack on, so that packs of flat vectors are aligned.
Segments from_whole_pack(Segments segments) {
  segments.begin -= segments.begin % kPack;
  return segments;
}

Index blocks_over(const Segments& segments) {
  return blocks_for((segments.end - segments.begin + kWarp * kPack - 1) / (kWarp * kPack));
}

// For arithmetic in float, float64 rows are taken element by element.
template <class T>
bool rows_move_whole(const Ring& ring) {
  return rows_are_aligned(ring) && size_of(ring.row_dtype) <= static_cast<int>(sizeof(T));
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 2)
    stats_kernel(const Segments segments, const Ring ring, bool has_direction, bool together,
                 T sign, double* stats, Workspace workspace) {
  FUSE_SHARED(double, shared);
  const GridSums sums(shared, kGradStats, 1, workspace);
  Row direction{};
  if (has_direction) direction = open_s_row(ring);
  double slope = 0, square = 0, absolute = 0, penalty = 0;
  T largest = 0;
  visit_segments<T>(segments, together, [&](auto width, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value;
    T g[W], x[W], p[W];
    load_elements<W>(s.grad_dtype, grad_at(s, first), g);
    if (has_direction) load_row<W>(direction, at, p);
    T sum_gp = 0, sum_gg = 0, sum_abs = 0, sum_xx = 0;
    const bool decays = s.weight_decay != 0.0;
    if (decays) load_elements<W>(s.param_dtype, param_at(s, first), x);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      g[k] *= sign;
      if (decays) {
        g[k] += static_cast<T>(s.weight_decay) * x[k];
        sum_xx += x[k] * x[k];
      }
      const T magnitude = magnitude_of(g[k]);
      sum_gg += g[k] * g[k];
      sum_abs += magnitude;
      largest = larger(largest, magnitude);
      if (has_direction) sum_gp += g[k] * p[k];
    }
    slope += static_cast<double>(sum_gp);
    square += static_cast<double>(sum_gg);
    absolute += static_cast<double>(sum_abs);
    if (decays) penalty += 0.5 * s.weight_decay * static_cast<double>(sum_xx);
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

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 2)
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
  visit_segments<T>(segments, together, [&](auto width, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value;
    T x[W], p[W];
    if (step != 0.0) load_row<W>(direction, at, p);
    if (save) {
      load_elements<W>(s.param_dtype, param_at(s, first), x);
      store_elements<W, false>(dtype_of<T>(), origin + at, x);
    } else {
      load_elements<W>(dtype_of<T>(), origin + at, x);
    }
    if (step != 0.0) {
#pragma unroll
      for (int k = 0; k < W; ++k) x[k] += length * p[k];
    } else if (save) {
      return;
    }
    store_elements<W, false>(s.param_dtype, param_at(s, first), x);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 2)
    blend_kernel(const Segments segments, const T* origin, const Ring ring, bool together,
                 double theta, double step, Workspace workspace) {
  FUSE_SHARED(double, shared);
  const GridSums sums(shared, 1, 0, workspace);
  const Row direction = open_s_row(ring);
  const T adam_share = static_cast<T>(theta), lbfgs_share = static_cast<T>(1.0 - theta);
  const T lbfgs_step = static_cast<T>(step);
  const bool mostly_adam = theta > 0.5;
  const Index numel = ring.numel;
  double square = 0;
  // A tile is a block of an 8-bit row. Lanes beyond the end stay with their warp.
  static_assert(kWarp * kPack == kScaleBlock);
  for (Index tile = first_tile(); tile * kScaleBlock < numel; tile += tile_stride()) {
    const Index flat = tile * kScaleBlock + lane_of_thread() * kPack;
    const bool whole = together && flat + kPack <= numel;
    T p[kPack], taken[kPack] = {};
    load_row_pack<kPack>(direction, flat, numel, whole, p);
    visit_pack<T, kPack>(segments.table, flat, numel, together,
                         [&](auto width, const Segment& s, Index first, Index at) {
      constexpr int W = decltype(width)::value;
      T x[W], from[W];
      load_elements<W>(s.param_dtype, param_at(s, first), x);
      load_elements<W>(dtype_of<T>(), origin + at, from);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const int i = W == 1 ? 0 : k;
        if (W == 1 && flat + k != at) continue;
        const T goal = from[i] + lbfgs_step * p[k], gap = goal - x[i];
        // Exact at theta = 0 and 1, and where both iterates agree.
        x[i] = mostly_adam ? x[i] + lbfgs_share * gap : goal - adam_share * gap;
      }
      store_elements<W, true>(s.param_dtype, param_at(s, first), x);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const int i = W == 1 ? 0 : k;
        if (W == kPack || flat + k == at) taken[k] = x[i] - from[i];
      }
    });
    store_row_pack<kPack>(direction, flat, numel, whole, taken);
    T sum = 0;
#pragma unroll
    for (int k = 0; k < kPack; ++k) sum += taken[k] * taken[k];
    square += static_cast<double>(sum);
  }
  square = warp_sum(square);
  if (lane_of_thread() == 0) sums.cell(0) = square;
  sums.finish([&](int, double total) { ring.scalars[kDirectionSq] = total; });
}

template <class T, bool to_flat>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 2)
    copy_kernel(const Segments segments, T* flat, bool together) {
  visit_segments<T>(segments, together, [&](auto width, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value;
    void* const grad = const_cast<void*>(grad_at(s, first));
    T values[W];
    if constexpr (to_flat) {
      load_elements<W>(s.grad_dtype, grad, values);
      store_elements<W, false>(dtype_of<T>(), flat + at, values);
    } else {
      load_elements<W>(dtype_of<T>(), flat + at, values);
      store_elements<W, false>(s.grad_dtype, grad, values);
    }
  });
}

template <bool to_flat>
void copy(const Segments& segments, DType dtype, void* flat, void* stream) {
  const Segments all = from_whole_pack(segments);
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FUSE_LAUNCH((copy_kernel<T, to_flat>), blocks_over(all), 0, stream, all, static_cast<T*>(flat),
                is_aligned(flat, 16));
  });
}

}  // namespace

void launch_grad_stats(const Segments& segments, DType dtype, bool maximize, const Ring* ring,
                       double* stats, Workspace workspace, void* stream) {
  const Segments all = from_whole_pack(segments);
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FUSE_LAUNCH((stats_kernel<T>), blocks_over(all), sums_bytes(kGradStats), stream, all,
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
    FUSE_LAUNCH((move_kernel<T>), blocks_over(all), 0, stream, all, static_cast<T*>(origin), ring,
                rows_move_whole<T>(ring) && is_aligned(origin, 16), step, save, control);
  });
}

void launch_fuse_blend(const Segments& segments, DType dtype, const void* origin, const Ring& ring,
                       double theta, double step, Workspace workspace, void* stream) {
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FUSE_LAUNCH((blend_kernel<T>), blocks_for((ring.numel + kScaleBlock - 1) / kScaleBlock),
                sums_bytes(1), stream, segments, static_cast<const T*>(origin), ring,
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
