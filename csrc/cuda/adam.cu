// The Adam step in one launch, for any number of segments.
//
// Bytes an element (fp32 parameters and state): reads grad, param, exp_avg, exp_avg_sq, writes
// param, exp_avg, exp_avg_sq: 28. amsgrad adds 8; bf16 parameters and gradients take 22. With
// moments in bf16 it is 20, and amsgrad adds 4.
#include "packs.cuh"
#include "reduce.cuh"

namespace fuse_ext::cuda {
namespace {

constexpr int kPack = 4;

template <class T>
struct AdamArguments {
  Segments segments;
  void *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
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

// The random bits of the step, whose number may lie on the device.
template <class T>
__device__ __forceinline__ RandomKey key_of(const AdamArguments<T>& a) {
  const bool on_device = a.step.data != nullptr;
  return random_key(on_device ? static_cast<std::int64_t>(read(a.step)) + 1 : a.options.step);
}

template <int W>
__device__ __forceinline__ void store_bf16(void* to, const BFloat16 (&values)[W]) {
  if constexpr (W == 1) {
    store_global(to, values[0].bits);
  } else {
    std::uint32_t words[W / 2];
#pragma unroll
    for (int k = 0; k < W; k += 2) {
      words[k / 2] = values[k].bits | static_cast<std::uint32_t>(values[k + 1].bits) << 16;
    }
    store_words<2 * W>(to, words);
  }
}

// kept: how the moments are stored, as T or in bf16.
template <class T, DType kept, bool amsgrad>
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
  RandomKey key{};
  if (kept == DType::bf16) key = key_of(a);
  const GridSums sums(shared, 1, 0, whole_grid(a.workspace));
  const Segments& segments = a.segments;
  double sum = 0;
  visit_tiles<T, kPack, 1>(segments, a.together,
                           [&](auto width, auto, const Segment& s, Index first, Index at) {
    constexpr int W = decltype(width)::value;
    void* const m_at = byte_offset(a.exp_avg, at * size_of(kept));
    void* const v_at = byte_offset(a.exp_avg_sq, at * size_of(kept));
    void* const max_at = amsgrad ? byte_offset(a.max_exp_avg_sq, at * size_of(kept)) : nullptr;
    T grad[1][W], param[1][W], m[1][W], v[1][W], v_max[1][W];
    if constexpr (W == 1) {
      load_elements<1, 1>(s.grad_dtype, grad_at(s, first), grad);
      load_elements<1, 1>(s.param_dtype, param_at(s, first), param);
      load_elements<1, 1>(kept, m_at, m);
      load_elements<1, 1>(kept, v_at, v);
      if (amsgrad) load_elements<1, 1>(kept, max_at, v_max);
    } else {
      // All loads under way before the first conversion waits for one.
      Bits<kPack, sizeof(T)> grad_bits, param_bits, m_bits, v_bits, max_bits;
      grad_bits.load(s.grad_dtype, grad_at(s, first));
      param_bits.load(s.param_dtype, param_at(s, first));
      m_bits.load(kept, m_at);
      v_bits.load(kept, v_at);
      if (amsgrad) max_bits.load(kept, max_at);
      grad_bits.convert(s.grad_dtype, grad);
      param_bits.convert(s.param_dtype, param);
      m_bits.convert(kept, m);
      v_bits.convert(kept, v);
      if (amsgrad) max_bits.convert(kept, v_max);
    }
    T square = 0;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const T raw = adam_element<T, amsgrad>(param[0][k], grad[0][k], m[0][k], v[0][k],
                                             amsgrad ? &v_max[0][k] : nullptr, c);
      square += raw * raw;
    }
    sum += static_cast<double>(square);
    store_elements<W, 1, false>(s.param_dtype, param_at(s, first), param);
    if constexpr (kept == DType::bf16) {
      BFloat16 m_kept[W], v_kept[W], max_kept[W];
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const std::uint32_t random = random_bits(static_cast<std::uint32_t>(at + k), key);
        store_moments<amsgrad>(&m_kept[k], &v_kept[k], &max_kept[k], m[0][k], v[0][k],
                               amsgrad ? v_max[0][k] : 0.0f, random);
      }
      store_bf16(m_at, m_kept);
      store_bf16(v_at, v_kept);
      if constexpr (amsgrad) store_bf16(max_at, max_kept);
    } else {
      store_elements<W, 1, false>(kept, m_at, m);
      store_elements<W, 1, false>(kept, v_at, v);
      if (amsgrad) store_elements<W, 1, false>(kept, max_at, v_max);
    }
  });
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

template <class T, DType kept>
void launch(const Segments& segments, const AdamState& state, const AdamOptions& options,
            Workspace workspace, void* stream) {
  AdamArguments<T> a{};
  a.segments = segments;
  a.segments.begin -= segments.begin % kPack;
  a.exp_avg = state.exp_avg;
  a.exp_avg_sq = state.exp_avg_sq;
  a.max_exp_avg_sq = state.max_exp_avg_sq;
  constexpr int pack_bytes = alignment_of(kPack * size_of(kept));
  a.together = is_aligned(a.exp_avg, pack_bytes) && is_aligned(a.exp_avg_sq, pack_bytes) &&
               is_aligned(a.max_exp_avg_sq, pack_bytes);
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
  constexpr Index kLength = kPackStep<kPack>;
  const Index blocks = blocks_for((segments.end - a.segments.begin + kLength - 1) / kLength, kWarps,
                                  kMostLightBlocks);
  if (a.max_exp_avg_sq != nullptr) {
    FUSE_LAUNCH((adam_kernel<T, kept, true>), blocks, sums_bytes(1), stream, a);
  } else {
    FUSE_LAUNCH((adam_kernel<T, kept, false>), blocks, sums_bytes(1), stream, a);
  }
}

}  // namespace

std::int64_t workspace_size(std::int64_t width) { return (kMostLightBlocks + kGroups) * width; }

void launch_adam(const Segments& segments, const AdamState& state, const AdamOptions& options,
                 Workspace workspace, void* stream) {
  if (state.dtype == DType::bf16) {
    return launch<float, DType::bf16>(segments, state, options, workspace, stream);
  }
  with_state_type(state.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch<T, dtype_of<T>()>(segments, state, options, workspace, stream);
  });
}

}  // namespace fuse_ext::cuda
