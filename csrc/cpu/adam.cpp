// adam_step for CPU tensors.
#include <torch/library.h>

#include <algorithm>

#include "../adapters.h"
#include "parallel.h"

namespace fuse_ext {
namespace {

// M: how the moments are kept, float, double or BFloat16; T: the arithmetic.
template <class T, class M>
void step(const TensorSegments& segments, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
          const std::optional<at::Tensor>& max_exp_avg_sq, const AdamOptions& options,
          double* sum_sq) {
  const AdamCoefficients<T> coefficients = adam_coefficients<T>(options);
  const SegmentTable table = segments.table();
  M* m = static_cast<M*>(exp_avg.data_ptr());
  M* v = static_cast<M*>(exp_avg_sq.data_ptr());
  M* v_max = max_exp_avg_sq ? static_cast<M*>(max_exp_avg_sq->data_ptr()) : nullptr;
  constexpr bool narrow = sizeof(M) < sizeof(T);
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t moments = v_max == nullptr ? 2 : 3;
  const Pass pass{.vectors = 3 + (narrow ? 1 : 2) * moments, .width = 1};
  run_chunks(segments.begin(), segments.end(), pass, sum_sq,
             [&](std::int64_t begin, std::int64_t end, double* out) {
    if constexpr (narrow) {
      const RandomKey key = random_key(options.step);
      kernels.adam_bf16(table, begin, end, m, v, v_max, coefficients, key, out);
    } else {
      kernels.of<T>().adam(table, begin, end, m, v, v_max, coefficients, out);
    }
  });
}

void count_one(const std::optional<at::Tensor>& counts, std::size_t which) {
  if (!counts) return;
  counts->data_ptr<double>()[which] += 1.0;
  bump_version(*counts);
}

double first_of(const at::Tensor& steps) {
  return steps.scalar_type() == at::kDouble ? *steps.const_data_ptr<double>()
                                            : static_cast<double>(*steps.const_data_ptr<float>());
}

void count_step(const at::Tensor& steps, std::int64_t step) {
  if (steps.scalar_type() == at::kDouble) {
    std::fill_n(steps.data_ptr<double>(), steps.numel(), static_cast<double>(step));
  } else {
    std::fill_n(steps.data_ptr<float>(), steps.numel(), static_cast<float>(step));
  }
  bump_version(steps);
}

void adam_step(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
               at::Tensor exp_avg, at::Tensor exp_avg_sq,
               const std::optional<at::Tensor>& max_exp_avg_sq, at::Tensor stats,
               std::int64_t step_count, double lr, double beta1, double beta2, double eps,
               double eps_in_root, double weight_decay, bool decoupled_weight_decay, bool maximize,
               const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf,
               const std::optional<at::Tensor>& step_tensor,
               const std::optional<at::Tensor>& lr_tensor, const std::optional<at::Tensor>& loss,
               const std::optional<at::Tensor>& grad_square,
               const std::optional<at::Tensor>& counts) {
  const std::int64_t numel = exp_avg.numel();
  const at::ScalarType kept = exp_avg.scalar_type(), dtype = arithmetic_of(exp_avg, "exp_avg");
  check_flat(exp_avg, "exp_avg", numel, kept);
  check_flat(exp_avg_sq, "exp_avg_sq", numel, kept);
  if (max_exp_avg_sq) check_flat(*max_exp_avg_sq, "max_exp_avg_sq", numel, kept);
  check_flat(stats, "stats", 1, at::kDouble);
  if (step_tensor) {
    check_steps(*step_tensor, "step_tensor", exp_avg.device());
    step_count = static_cast<std::int64_t>(first_of(*step_tensor)) + 1;
  }
  TORCH_CHECK_VALUE(step_count >= 1, "step=", step_count, " must be at least 1");
  if (lr_tensor) {
    check_number(*lr_tensor, "lr_tensor", exp_avg.device());
    lr = lr_tensor->item<double>();
  }
  if (counts) check_flat(*counts, "counts", 2, at::kDouble);
  TensorSegments segments(params, grads, offsets, numel, dtype, {});
  const auto is_bad = [](const std::optional<at::Tensor>& number) {
    return number && !is_finite(number->item<double>());
  };
  const bool skips =
      (found_inf && found_inf->item<double>() != 0.0) || is_bad(loss) || is_bad(grad_square);
  if (skips) return count_one(counts, 1);
  const AdamOptions options{step_count,   lr,
                            beta1,        beta2,
                            eps,          eps_in_root,
                            weight_decay, decoupled_weight_decay,
                            maximize,     grad_scale ? grad_scale->item<double>() : 1.0};
  double* sum_sq = stats.data_ptr<double>();
  if (kept == at::kDouble) {
    step<double, double>(segments, exp_avg, exp_avg_sq, max_exp_avg_sq, options, sum_sq);
  } else if (kept == at::kBFloat16) {
    step<float, BFloat16>(segments, exp_avg, exp_avg_sq, max_exp_avg_sq, options, sum_sq);
  } else {
    step<float, float>(segments, exp_avg, exp_avg_sq, max_exp_avg_sq, options, sum_sq);
  }
  segments.params_changed();
  for (const at::Tensor& state : {exp_avg, exp_avg_sq, stats}) bump_version(state);
  if (max_exp_avg_sq) bump_version(*max_exp_avg_sq);
  if (step_tensor) count_step(*step_tensor, step_count);
  count_one(counts, 0);
}

}  // namespace

// Also for sparse tensors: the check in adapters.cpp says more than the dispatcher's refusal.
TORCH_LIBRARY_IMPL(fuse_ext, CPU, m) { m.impl("adam_step", &adam_step); }
TORCH_LIBRARY_IMPL(fuse_ext, SparseCPU, m) { m.impl("adam_step", &adam_step); }
TORCH_LIBRARY_IMPL(fuse_ext, SparseCsrCPU, m) { m.impl("adam_step", &adam_step); }

}  // namespace fuse_ext
