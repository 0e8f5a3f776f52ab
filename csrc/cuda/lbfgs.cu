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

// How a warp's tile of the flat vector lies in its threads' registers: kPacks packs each, of as
// many elements as fill 128 bits of a row (64 for 8-bit rows: more would not fit into registers).
template <class T, DType row>
struct Tile {
  static constexpr int kElements = sizeof(T) == 8 || size_of(row) == 8 ? 8 : 16;  // per thread
  static constexpr int kPack = row == DType::i8 ? 8 : 16 / size_of(row);
  static constexpr int kPacks = kElements / kPack;
  static constexpr Index kLength = kWarp * kElements;

  using Values = T[kPacks][kPack];

  // First flat index of this thread's u-th pack.
  static __device__ __forceinline__ Index pack(Index tile, int u) {
    return tile * kLength + (u * kWarp + lane_of_thread()) * kPack;
  }

  // The thread's share of a row. `whole`: it has all the tile's elements and is aligned; else zeros
  // stand beyond its end.
  static __device__ __forceinline__ void load(const Row& from, Index tile, Index numel, bool whole,
                                              Values& out) {
    if constexpr (kPacks > 1) {
      // Several loads under way together.
      if (whole && from.dtype != DType::i8) {
        constexpr int kWidest = size_of(row) > static_cast<int>(sizeof(T)) ? 8 : sizeof(T);
        Bits<kPack, kWidest> bits[kPacks];
#pragma unroll
        for (int u = 0; u < kPacks; ++u) {
          const Index bytes = pack(tile, u) * size_of(from.dtype);
          bits[u].load(from.dtype, byte_offset(static_cast<const void*>(from.data), bytes));
        }
#pragma unroll
        for (int u = 0; u < kPacks; ++u) bits[u].convert(from.dtype, out[u]);
        return;
      }
    }
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      load_row_pack<kPack>(from, pack(tile, u), numel, whole, out[u]);
    }
  }

  // The values become what was stored.
  static __device__ __forceinline__ void store(const Row& to, Index tile, Index numel, bool whole,
                                               Values& values) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      store_row_pack<kPack>(to, pack(tile, u), numel, whole, values[u]);
    }
  }

  static __device__ __forceinline__ void gradient(const SegmentTable& table, Index tile,
                                                  Index numel, T sign, Values& g) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      load_gradient<T, kPack>(table, pack(tile, u), numel, sign, g[u]);
    }
  }
};

// a b + c with one rounding. (Contraction is off: Adam's step has the same bits everywhere.)
__device__ __forceinline__ float mul_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double mul_add(double a, double b, double c) { return fma(a, b, c); }

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
constexpr int kBlocksAtOnce = sizeof(T) == 4 && row != DType::i8 ? 3 : 2;

template <class T>
struct PassArguments {
  Segments segments;
  Ring ring;
  T* grad_prev;  // may be null: the open slot's Y row
  T sign;
  bool flag;     // form_pair, or whether directions are scaled by segment
  bool aligned;  // rows and grad_prev start where whole packs may
  int warps;     // of a block that take part
  double* control;
  Workspace workspace;
};

// The columns of the sums are the scalars' arrays kGradS, kGradY, kYS, kYY end to end; with a
// control, its norms follow.
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
  const int slots = static_cast<int>(ring.slots), arrays = form_pair ? 4 : 2;
  const int lane = lane_of_thread(), dots = arrays * slots;
  const GridSums sums(shared, dots + (decides ? kNorms : 0), decides ? kLargestNorms : 0,
                      a.workspace, a.warps);
  T largest = 0, largest_x = 0;
  // One lane for each of the four arrays.
  const auto add_dots = [&](Index slot, T gs, T gy, T ys, T yy) {
    const T sum = warp_sum_of_four(gs, gy, ys, yy);
    if (lane < arrays) {
      sums.cell(lane * slots + static_cast<int>(slot)) += static_cast<double>(sum);
    }
  };
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Index tile = static_cast<Index>(blockIdx.x) * a.warps + warp;
  for (; warp < a.warps && tile * Pass::kLength < numel;
       tile += static_cast<Index>(gridDim.x) * a.warps) {
    const bool whole = a.aligned && (tile + 1) * Pass::kLength <= numel;
    typename Pass::Values g, y, s_values, y_values;
    Pass::gradient(a.segments.table, tile, numel, a.sign, g);
    if (decides) {
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
    if (first_steps) {
#pragma unroll
      for (int u = 0; u < Pass::kPacks; ++u) {
        largest_x = larger(
            largest_x, largest_param<T, Pass::kPack>(a.segments.table, Pass::pack(tile, u), numel));
      }
    }
    if (form_pair) {
      const Row y_open = row_of(a.ring, row, 1, ring.open);
      if (a.grad_prev != nullptr) {
        Pass::load({a.grad_prev, nullptr, dtype_of<T>()}, tile, numel, whole, y);
      } else {
        Pass::load(y_open, tile, numel, whole, y);
      }
      Pass::load(row_of(a.ring, row, 0, ring.open), tile, numel, whole, s_values);
#pragma unroll
      for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
        for (int k = 0; k < Pass::kPack; ++k) y[u][k] = g[u][k] - y[u][k];
      }
      Pass::store(y_open, tile, numel, whole, y);
      add_dots(ring.open, dot(g, s_values), dot(g, y), dot(y, s_values), dot(y, y));
    }
    Index slot = ring.open;
    for (Index age = 0; age < ring.count; ++age) {
      slot = ring.older(slot);
      Pass::load(row_of(a.ring, row, 0, slot), tile, numel, whole, s_values);
      Pass::load(row_of(a.ring, row, 1, slot), tile, numel, whole, y_values);
      if (form_pair) {
        add_dots(slot, dot(g, s_values), dot(g, y_values), dot(y, s_values), dot(y, y_values));
      } else {
        add_dots(slot, dot(g, s_values), dot(g, y_values), T(0), T(0));
      }
    }
  }
  if (decides && warp < a.warps) {
    largest = warp_max(largest);
    largest_x = warp_max(largest_x);
    static_assert(kGradSquare + 2 == kGradLargest && kGradLargest + 1 == kParamLargest);
    if (lane == 0) {
      sums.cell(dots + 2) = static_cast<double>(largest);
      sums.cell(dots + 3) = static_cast<double>(largest_x);
    }
  }
  sums.finish([&](int column, double total) {
    if (column >= dots) {
      const int norm = kGradSquare + column - dots;
      if (norm != kParamLargest || first_steps) a.control[norm] = total;
      return;
    }
    const Index slot = column % slots;
    const bool opened = slot == ring.open;
    if (!ring.holds(slot) && !(form_pair && opened)) return;
    state.array(kGradS)[column] = total;
    if (opened && column >= 3 * slots) state[kYDotY] = total;
  });
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
  const GridSums sums(shared, 3, 1, a.workspace);
  // Behind the sums: the coefficients of S and Y rows, newest pair first.
  T* const coefs = reinterpret_cast<T*>(shared + (kWarps * 3 > kThreads ? kWarps * 3 : kThreads));
  for (Index age = threadIdx.x; age < ring.count; age += kThreads) {
    const Index slot = ring.open > age ? ring.open - 1 - age : ring.open - 1 - age + ring.slots;
    coefs[2 * age] = static_cast<T>(state.array(kCoefS)[slot]);
    coefs[2 * age + 1] = static_cast<T>(state.array(kCoefY)[slot]);
  }
  const T coef_g = static_cast<T>(*state.array(kCoefG));
  __syncthreads();
  double slope = 0, square = 0;
  T largest = 0;
  for (Index tile = first_tile(); tile * Pass::kLength < numel; tile += tile_stride()) {
    const bool whole = a.aligned && (tile + 1) * Pass::kLength <= numel;
    typename Pass::Values g, p, s_values, y_values;
    Pass::gradient(a.segments.table, tile, numel, a.sign, g);
#pragma unroll
    for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
      for (int k = 0; k < Pass::kPack; ++k) p[u][k] = coef_g * g[u][k];
    }
    Index slot = ring.open;
    for (Index age = 0; age < ring.count; ++age) {
      slot = ring.older(slot);
      Pass::load(row_of(a.ring, row, 0, slot), tile, numel, whole, s_values);
      Pass::load(row_of(a.ring, row, 1, slot), tile, numel, whole, y_values);
      const T coef_s = coefs[2 * age], coef_y = coefs[2 * age + 1];
#pragma unroll
      for (int u = 0; u < Pass::kPacks; ++u) {
#pragma unroll
        for (int k = 0; k < Pass::kPack; ++k) {
          p[u][k] = mul_add(coef_s, s_values[u][k], p[u][k]);
          p[u][k] = mul_add(coef_y, y_values[u][k], p[u][k]);
        }
      }
    }
    if (a.flag) {
#pragma unroll
      for (int u = 0; u < Pass::kPacks; ++u) {
        scale_by_segment<T, Pass::kPack>(a.segments.table, Pass::pack(tile, u), numel, p[u]);
      }
    }
    Pass::store(row_of(a.ring, row, 0, ring.open), tile, numel, whole, p);
    if (a.grad_prev != nullptr) {
      Pass::store({a.grad_prev, nullptr, dtype_of<T>()}, tile, numel, whole, g);
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
  return (columns - update_width(0)) / (update_width(1) - update_width(0));
}

void launch_lbfgs_update(const Segments& segments, DType dtype, bool maximize, const Ring& ring,
                         const void* grad_prev, bool form_pair, double* control,
                         Workspace workspace, void* stream) {
  with_types(dtype, ring.row_dtype, [&](auto zero, auto row) {
    using T = decltype(zero);
    constexpr DType kRow = decltype(row)::value;
    PassArguments<T> a =
        pass_arguments<T>(segments, maximize, form_pair, ring, grad_prev, control, workspace);
    // A long history leaves shared memory for the sums of few warps.
    const Index width = update_width(ring.scalars.slots);
    const Index fit = kSharedBytes / (width * static_cast<Index>(sizeof(double)));
    a.warps = static_cast<int>(fit < kWarps ? fit : kWarps);
    FUSE_LAUNCH((update_kernel<T, kRow>), blocks_for(tiles_of<T, kRow>(ring.numel), a.warps),
                sums_bytes(width, a.warps), stream, a);
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
    const PassArguments<T> a = pass_arguments<T>(segments, maximize, scaled, ring, grad_prev,
                                                 const_cast<double*>(control), workspace);
    const Index coefs = 2 * ring.scalars.slots * static_cast<Index>(sizeof(T));
    FUSE_LAUNCH((direction_kernel<T, kRow>), blocks_for(tiles_of<T, kRow>(ring.numel)),
                sums_bytes(3) + coefs, stream, a);
  });
}

}  // namespace fuse_ext::cuda
