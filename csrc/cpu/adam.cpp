// adam_step for CPU tensors.
#include <torch/library.h>

#include "../adapters.h"
#include "parallel.h"

namespace fuse_ext {
namespace {

template <class T>
void step(const TensorSegments& segments, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
          const std::optional<at::Tensor>& max_exp_avg_sq, const AdamOptions& options,
          double* sum_sq) {
  const AdamCoefficients<T> coefficients = adam_coefficients<T>(options);
  const SegmentTable table = segments.table();
  T* m = exp_avg.data_ptr<T>();
  T* v = exp_avg_sq.data_ptr<T>();
  T* v_max = max_exp_avg_sq ? max_exp_avg_sq->data_ptr<T>() : nullptr;
  const auto kernel = cpu_kernels().of<T>().adam;
  const Pass pass{.vectors = v_max == nullptr ? 7 : 9, .width = 1};
  run_chunks(segments.begin(), segments.end(), pass, sum_sq,
             [&](std::int64_t begin, std::int64_t end, double* out) {
    kernel(table, begin, end, m, v, v_max, coefficients, out);
  });
}

void adam_step(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
               at::Tensor exp_avg, at::Tensor exp_avg_sq,
               const std::optional<at::Tensor>& max_exp_avg_sq, at::Tensor stats,
               std::int64_t step_count, double lr, double beta1, double beta2, double eps,
               double eps_in_root, double weight_decay, bool decoupled_weight_decay, bool maximize,
               const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf) {
  const std::int64_t numel = exp_avg.numel();
  const at::ScalarType dtype = state_dtype_of(exp_avg, "exp_avg");
  check_flat(exp_avg, "exp_avg", numel, dtype);
  check_flat(exp_avg_sq, "exp_avg_sq", numel, dtype);
  if (max_exp_avg_sq) check_flat(*max_exp_avg_sq, "max_exp_avg_sq", numel, dtype);
  check_flat(stats, "stats", 1, at::kDouble);
  TORCH_CHECK_VALUE(step_count >= 1, "step=", step_count, " must be at least 1");
  TensorSegments segments(params, grads, offsets, numel, dtype, {});
  if (found_inf && found_inf->item<double>() != 0.0) return;
  const AdamOptions options{step_count,   lr,
                            beta1,        beta2,
                            eps,          eps_in_root,
                            weight_decay, decoupled_weight_decay,
                            maximize,     grad_scale ? grad_scale->item<double>() : 1.0};
  double* sum_sq = stats.data_ptr<double>();
  if (dtype == at::kDouble) {
    step<double>(segments, exp_avg, exp_avg_sq, max_exp_avg_sq, options, sum_sq);
  } else {
    step<float>(segments, exp_avg, exp_avg_sq, max_exp_avg_sq, options, sum_sq);
  }
  segments.params_changed();
  for (const at::Tensor& state : {exp_avg, exp_avg_sq, stats}) bump_version(state);
  if (max_exp_avg_sq) bump_version(*max_exp_avg_sq);
}

}  // namespace

// Also for sparse tensors: the check in adapters.cpp says more than the dispatcher's refusal.
TORCH_LIBRARY_IMPL(fuse_ext, CPU, m) { m.impl("adam_step", &adam_step); }
TORCH_LIBRARY_IMPL(fuse_ext, SparseCPU, m) { m.impl("adam_step", &adam_step); }
TORCH_LIBRARY_IMPL(fuse_ext, SparseCsrCPU, m) { m.impl("adam_step", &adam_step); }

}  // namespace fuse_ext
