// The Adam step: one read of grad, one read and write of param, exp_avg and exp_avg_sq
// (28 bytes an element in fp32), with the sum of squared gradients for Eq. 3 on the way.
#pragma once

#include "blocks.inl"

namespace fuse_ext {
namespace {

template <class T, bool amsgrad>
FUSE_INLINE T adam_run(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq,
                       std::int64_t n, const AdamCoefficients<T>& c) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    const T g = adam_element<T, amsgrad>(param[i], grad[i], exp_avg[i], exp_avg_sq[i],
                                         amsgrad ? &max_exp_avg_sq[i] : nullptr, c);
    sum += g * g;
  }
  return sum;
}

template <class T>
void adam(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* exp_avg,
          T* exp_avg_sq, T* max_exp_avg_sq, const AdamCoefficients<T>& c, double* out) {
  const AdamCoefficients<T> local = c;  // a copy that no store can alias
  double sum = 0;
  table.for_each_piece(
      begin, end, [&](const Segment& s, std::int64_t first, std::int64_t at, std::int64_t length) {
    T param_scratch[kRun], grad_scratch[kRun];
    for (std::int64_t done = 0; done < length; done += kRun) {
      const std::int64_t n = length - done < kRun ? length - done : kRun;
      const std::int64_t flat = at + done;
      const T* grad = read<T>(s.grad_dtype, s.grad, first + done, n, grad_scratch);
      T* param = const_cast<T*>(read<T>(s.param_dtype, s.param, first + done, n, param_scratch));
      sum += static_cast<double>(max_exp_avg_sq != nullptr
                                     ? adam_run<T, true>(param, grad, exp_avg + flat,
                                                         exp_avg_sq + flat, max_exp_avg_sq + flat,
                                                         n, local)
                                     : adam_run<T, false>(param, grad, exp_avg + flat,
                                                          exp_avg_sq + flat, nullptr, n, local));
      write<T>(s.param_dtype, s.param, first + done, n, param, false);
    }
  });
  out[0] = sum;
}

}  // namespace
}  // namespace fuse_ext
