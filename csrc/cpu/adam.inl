// The Adam step: one read of grad, one read and write of param, exp_avg and exp_avg_sq
// (28 bytes an element in fp32, 20 with moments in bfloat16), with the sum of squared gradients for
// Eq. 3 on the way.
#pragma once

#include <type_traits>

#include "blocks.inl"

namespace fuse_ext {
namespace {

template <class T, bool amsgrad, bool plain>
FUSE_INLINE T adam_run(T* params, const T* grads, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq,
                       std::int64_t n, const AdamCoefficients<T>& c) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    T param = params[i], m = exp_avg[i], v = exp_avg_sq[i];  // in registers over all of it
    T v_max = amsgrad ? max_exp_avg_sq[i] : T(0);
    const T g = adam_element<T, amsgrad, plain>(param, grads[i], m, v, &v_max, c);
    params[i] = param, exp_avg[i] = m, exp_avg_sq[i] = v;
    if (amsgrad) max_exp_avg_sq[i] = v_max;
    sum += g * g;
  }
  return sum;
}

template <bool amsgrad, bool plain>
FUSE_INLINE float adam_run_bf16(float* params, const float* grads, BFloat16* exp_avg,
                                BFloat16* exp_avg_sq, BFloat16* max_exp_avg_sq,
                                std::uint32_t element, std::int32_t n,
                                const AdamCoefficients<float>& c, const RandomKey& key) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int32_t i = 0; i < n; ++i) {  // counted in the width of the random bits
    float param = params[i], m = load<float>(exp_avg[i]), v = load<float>(exp_avg_sq[i]);
    float v_max = amsgrad ? load<float>(max_exp_avg_sq[i]) : 0.0f;
    const float g = adam_element<float, amsgrad, plain>(param, grads[i], m, v, &v_max, c);
    const std::uint32_t random = random_bits(element + static_cast<std::uint32_t>(i), key);
    params[i] = param;
    store_moments<amsgrad>(&exp_avg[i], &exp_avg_sq[i], amsgrad ? &max_exp_avg_sq[i] : nullptr, m,
                           v, v_max, random);
    sum += g * g;
  }
  return sum;
}

// Adds up what run(param, grad, flat index, n) returns for the runs of [begin, end), and stores
// their parameters.
template <class T, class Run>
FUSE_INLINE double adam_runs(const SegmentTable& table, std::int64_t begin, std::int64_t end,
                             Run&& run) {
  double sum = 0;
  table.for_each_piece(
      begin, end, [&](const Segment& s, std::int64_t first, std::int64_t at, std::int64_t length) {
    T param_scratch[kRun], grad_scratch[kRun];
    for (std::int64_t done = 0; done < length; done += kRun) {
      const std::int64_t n = length - done < kRun ? length - done : kRun;
      const T* grad = read<T>(s.grad_dtype, s.grad, first + done, n, grad_scratch);
      T* param = const_cast<T*>(read<T>(s.param_dtype, s.param, first + done, n, param_scratch));
      sum += static_cast<double>(run(param, grad, at + done, n));
      write<T>(s.param_dtype, s.param, first + done, n, param, false);
    }
  });
  return sum;
}

// Calls visit(amsgrad, plain) with constants.
template <class T, class Visit>
FUSE_INLINE void with_kind(bool amsgrad, const AdamCoefficients<T>& c, Visit&& visit) {
  const bool plain = is_plain(c);
  if (amsgrad) {
    plain ? visit(std::true_type{}, std::true_type{}) : visit(std::true_type{}, std::false_type{});
  } else {
    plain ? visit(std::false_type{}, std::true_type{})
          : visit(std::false_type{}, std::false_type{});
  }
}

template <class T>
void adam(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* exp_avg,
          T* exp_avg_sq, T* max_exp_avg_sq, const AdamCoefficients<T>& c, double* out) {
  const AdamCoefficients<T> local = c;  // a copy that no store can alias
  with_kind(max_exp_avg_sq != nullptr, c, [&](auto amsgrad, auto plain) {
    out[0] = adam_runs<T>(table, begin, end,
                          [&](T* param, const T* grad, std::int64_t flat, std::int64_t n) {
      return adam_run<T, amsgrad, plain>(param, grad, exp_avg + flat, exp_avg_sq + flat,
                                         amsgrad ? max_exp_avg_sq + flat : nullptr, n, local);
    });
  });
}

void adam_bf16(const SegmentTable& table, std::int64_t begin, std::int64_t end, BFloat16* exp_avg,
               BFloat16* exp_avg_sq, BFloat16* max_exp_avg_sq, const AdamCoefficients<float>& c,
               const RandomKey& key, double* out) {
  const AdamCoefficients<float> local = c;
  const RandomKey local_key = key;
  with_kind(max_exp_avg_sq != nullptr, c, [&](auto amsgrad, auto plain) {
    out[0] =
        adam_runs<float>(table, begin, end,
                         [&](float* param, const float* grad, std::int64_t flat, std::int64_t run) {
      const auto element = static_cast<std::uint32_t>(flat);
      const auto n = static_cast<std::int32_t>(run);
      return adam_run_bf16<amsgrad, plain>(param, grad, exp_avg + flat, exp_avg_sq + flat,
                                           amsgrad ? max_exp_avg_sq + flat : nullptr, element, n,
                                           local, local_key);
    });
  });
}

}  // namespace
}  // namespace fuse_ext
