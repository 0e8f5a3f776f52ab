// The Adam step in one launch, for any number of segments.
//
// Bytes an element (fp32 parameters and state): reads grad, param, exp_avg, exp_avg_sq, writes
// param, exp_avg, exp_avg_sq: 28. amsgrad adds 8; bf16 parameters and gradients take 22.
#include "packs.cuh"
#include "reduce.cuh"

namespace fuse_ext::cuda {
namespace {

constexpr int kPack = 4;

template <class T>
struct AdamArguments {
  Segments segments;
  T *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  bool together;  // the flat vectors' addresses allow whole packs
  double* sum_sq;
  Number grad_scale, found_inf, step, lr, loss, grad_square;
  Index steps;
  double* counts;
  double sign;
  AdamCoefficients<T> coefficients;
  AdamOptions options;
  Workspace workspace;
};

template <class T>
__device__ __forceinline__ bool skips(const AdamArguments<T>& a) {
  const auto is_bad = [](const Number& number) {
    return number.data != nullptr && !is_finite(read(number));
  };
  return (a.found_inf.data != nullptr && read(a.found_inf) != 0.0) || is_bad(a.loss) ||
         is_bad(a.grad_square);
}

// The coefficients of a step whose number or rate lies on the device. Powers in float64 are dear:
// one thread takes them for its block.
template <class T>
__device__ __forceinline__ void step_coefficients(const AdamArguments<T>& a, double* shared,
                                                  AdamCoefficients<T>& c) {
  if (threadIdx.x == 0) {
    AdamOptions options = a.options;
    if (a.step.data != nullptr) options.step = static_cast<std::int64_t>(read(a.step)) + 1;
    if (a.lr.data != nullptr) options.lr = read(a.lr);
    const AdamCoefficients<T> now = adam_coefficients<T>(options);
    shared[0] = static_cast<double>(now.step_size);
    shared[1] = static_cast<double>(now.root_scale);
    shared[2] = static_cast<double>(now.keep);
  }
  __syncthreads();
  c.step_size = static_cast<T>(shared[0]);
  c.root_scale = static_cast<T>(shared[1]);
  c.keep = static_cast<T>(shared[2]);
  __syncthreads();
}

template <class T, bool amsgrad>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 2)
    adam_kernel(const AdamArguments<T> a) {
  FUSE_SHARED(double, shared);
  if (skips(a)) {
    if (a.counts != nullptr && blockIdx.x == 0 && threadIdx.x == 0) a.counts[1] += 1.0;
    return;
  }
  AdamCoefficients<T> c = a.coefficients;
  if (a.step.data != nullptr || a.lr.data != nullptr) step_coefficients(a, shared, c);
  if (a.grad_scale.data != nullptr) {
    c.grad_scale = static_cast<T>(a.sign / read(a.grad_scale));
  }
  const GridSums sums(shared, 1, 0, a.workspace);
  const Segments& segments = a.segments;
  double sum = 0;
  for (Index tile = first_tile(); segments.begin + tile * kWarp * kPack < segments.end;
       tile += tile_stride()) {
    const Index flat = segments.begin + (tile * kWarp + lane_of_thread()) * kPack;
    if (flat >= segments.end) continue;
    visit_pack<T, kPack>(segments.table, flat, segments.end, a.together,
                         [&](auto width, const Segment& s, Index first, Index at) {
      constexpr int W = decltype(width)::value;
      constexpr DType dtype = dtype_of<T>();
      Bits<kPack, sizeof(T)> grad_bits, param_bits, m_bits, v_bits, max_bits;
      T grad[W], param[W], m[W], v[W], v_max[W];
      if constexpr (W == 1) {
        load_elements<1>(s.grad_dtype, grad_at(s, first), grad);
        load_elements<1>(s.param_dtype, param_at(s, first), param);
        m[0] = a.exp_avg[at], v[0] = a.exp_avg_sq[at];
        if (amsgrad) v_max[0] = a.max_exp_avg_sq[at];
      } else {
        // All loads under way before the first conversion waits for one.
        grad_bits.load(s.grad_dtype, grad_at(s, first));
        param_bits.load(s.param_dtype, param_at(s, first));
        m_bits.load(dtype, a.exp_avg + at);
        v_bits.load(dtype, a.exp_avg_sq + at);
        if (amsgrad) max_bits.load(dtype, a.max_exp_avg_sq + at);
        grad_bits.convert(s.grad_dtype, grad);
        param_bits.convert(s.param_dtype, param);
        m_bits.convert(dtype, m);
        v_bits.convert(dtype, v);
        if (amsgrad) max_bits.convert(dtype, v_max);
      }
      T square = 0;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const T raw = adam_element<T, amsgrad>(param[k], grad[k], m[k], v[k],
                                               amsgrad ? &v_max[k] : nullptr, c);
        square += raw * raw;
      }
      sum += static_cast<double>(square);
      store_elements<W, false>(s.param_dtype, param_at(s, first), param);
      store_elements<W, false>(dtype, a.exp_avg + at, m);
      store_elements<W, false>(dtype, a.exp_avg_sq + at, v);
      if (amsgrad) store_elements<W, false>(dtype, a.max_exp_avg_sq + at, v_max);
    });
  }
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) sums.cell(0) = sum;
  const bool is_last = sums.finish([&](int, double total) {
    *a.sum_sq = total;
    if (a.counts != nullptr) a.counts[0] += 1.0;
  });
  if (!is_last || a.step.data == nullptr) return;
  // All blocks have read the number of the step by now.
  for (Index i = threadIdx.x; i < a.steps; i += kThreads) {
    void* const count = byte_offset(const_cast<void*>(a.step.data), i * size_of(a.step.dtype));
    store_one(a.step.dtype, count, load_one<double>(a.step.dtype, count) + 1.0);
  }
}

template <class T>
void launch(const Segments& segments, const AdamState& state, const AdamOptions& options,
            Workspace workspace, void* stream) {
  AdamArguments<T> a{};
  a.segments = segments;
  a.segments.begin -= segments.begin % kPack;
  a.exp_avg = static_cast<T*>(state.exp_avg);
  a.exp_avg_sq = static_cast<T*>(state.exp_avg_sq);
  a.max_exp_avg_sq = static_cast<T*>(state.max_exp_avg_sq);
  a.together =
      is_aligned(a.exp_avg, 16) && is_aligned(a.exp_avg_sq, 16) && is_aligned(a.max_exp_avg_sq, 16);
  a.sum_sq = state.sum_sq;
  a.grad_scale = state.grad_scale;
  a.found_inf = state.found_inf;
  a.step = state.step;
  a.lr = state.lr;
  a.steps = state.steps;
  a.loss = state.loss;
  a.grad_square = state.grad_square;
  a.counts = state.counts;
  a.options = options;
  a.sign = options.maximize ? -1.0 : 1.0;
  a.coefficients = adam_coefficients<T>(options);
  a.workspace = workspace;
  const Index tiles = (segments.end - a.segments.begin + kWarp * kPack - 1) / (kWarp * kPack);
  if (a.max_exp_avg_sq != nullptr) {
    FUSE_LAUNCH((adam_kernel<T, true>), blocks_for(tiles), sums_bytes(1), stream, a);
  } else {
    FUSE_LAUNCH((adam_kernel<T, false>), blocks_for(tiles), sums_bytes(1), stream, a);
  }
}

}  // namespace

std::int64_t workspace_size(std::int64_t width) { return kMostBlocks * width; }

void launch_adam(const Segments& segments, const AdamState& state, const AdamOptions& options,
                 Workspace workspace, void* stream) {
  with_state_type(state.dtype, [&](auto zero) {
    launch<decltype(zero)>(segments, state, options, workspace, stream);
  });
}

}  // namespace fuse_ext::cuda
