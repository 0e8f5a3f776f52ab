// The ops for CUDA tensors: checks, launches, version counters. Nothing here waits for the
// device: what only its memory says (the ring's position, GradScaler's verdict) the kernels read.
#include <algorithm>
#include <limits>

#include "device.h"

namespace fuse_ext::cuda {
namespace {

DType kernel_dtype(at::ScalarType state) { return state == at::kDouble ? DType::f64 : DType::f32; }

// The device of an op: that of its parameters, or of its state where there are none.
at::Device device_of(at::TensorList params, const at::Tensor& state) {
  return params.empty() ? state.device() : params[0].device();
}

// Returns the tensor.
const at::Tensor& on_device(const at::Tensor& tensor, const char* name, const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " is on ", tensor.device(),
                    " but the op runs on ", device);
  return tensor;
}

// GradScaler's grad_scale or found_inf, read by the kernels. `kept` holds the memory.
Number device_number(const std::optional<at::Tensor>& given, const char* name,
                     const at::Device& device, at::Tensor& kept) {
  if (!given) return {nullptr, DType::f32};
  TORCH_CHECK_VALUE(given->numel() == 1, name, " has ", given->numel(), " elements, not one");
  const at::ScalarType dtype = given->scalar_type() == at::kFloat ? at::kFloat : at::kDouble;
  kept = given->to(at::TensorOptions(dtype).device(device), /*non_blocking=*/true);
  return {kept.const_data_ptr(), kernel_dtype(dtype)};
}

// A number that the kernel reads in the tensor itself.
Number number_in_place(const std::optional<at::Tensor>& given, const char* name,
                       const at::Device& device) {
  if (!given) return {nullptr, DType::f32};
  check_number(*given, name, device);
  return {given->data_ptr(), kernel_dtype(given->scalar_type())};
}

Number steps_in_place(const std::optional<at::Tensor>& given, const at::Device& device) {
  if (!given) return {nullptr, DType::f32};
  check_steps(*given, "step_tensor", device);
  return {given->data_ptr(), kernel_dtype(given->scalar_type())};
}

void adam_step(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
               at::Tensor exp_avg, at::Tensor exp_avg_sq,
               const std::optional<at::Tensor>& max_exp_avg_sq, at::Tensor stats, std::int64_t step,
               double lr, double beta1, double beta2, double eps, double eps_in_root,
               double weight_decay, bool decoupled_weight_decay, bool maximize,
               const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf,
               const std::optional<at::Tensor>& step_tensor,
               const std::optional<at::Tensor>& lr_tensor, const std::optional<at::Tensor>& loss,
               const std::optional<at::Tensor>& grad_square,
               const std::optional<at::Tensor>& counts) {
  const std::int64_t numel = exp_avg.numel();
  const at::ScalarType kept = exp_avg.scalar_type(), dtype = arithmetic_of(exp_avg, "exp_avg");
  const at::Device device = device_of(params, exp_avg);
  check_flat(exp_avg, "exp_avg", numel, kept);
  check_flat(exp_avg_sq, "exp_avg_sq", numel, kept);
  if (max_exp_avg_sq) check_flat(*max_exp_avg_sq, "max_exp_avg_sq", numel, kept);
  check_flat(stats, "stats", 1, at::kDouble);
  on_device(exp_avg, "exp_avg", device);
  on_device(exp_avg_sq, "exp_avg_sq", device);
  if (max_exp_avg_sq) on_device(*max_exp_avg_sq, "max_exp_avg_sq", device);
  on_device(stats, "stats", device);
  TORCH_CHECK_VALUE(step_tensor || step >= 1, "step=", step, " must be at least 1");
  if (counts) check_flat(on_device(*counts, "counts", device), "counts", 2, at::kDouble);
  const DeviceCall call(device);
  TORCH_CHECK(step_tensor || !call.is_capturing(), "step=", step,
              " would be the same whenever the graph that is being captured is replayed; use "
              "capturable=True (step_tensor)");
  TensorSegments tensors(params, grads, offsets, numel, dtype, {});
  at::Tensor scale_on_device, inf_on_device, loss_on_device, square_on_device;
  const AdamState state{kept == at::kBFloat16 ? DType::bf16 : kernel_dtype(dtype),
                        exp_avg.data_ptr(),
                        exp_avg_sq.data_ptr(),
                        max_exp_avg_sq ? max_exp_avg_sq->data_ptr() : nullptr,
                        stats.data_ptr<double>(),
                        device_number(grad_scale, "grad_scale", device, scale_on_device),
                        device_number(found_inf, "found_inf", device, inf_on_device),
                        steps_in_place(step_tensor, device),
                        number_in_place(lr_tensor, "lr_tensor", device),
                        step_tensor ? step_tensor->numel() : 0,
                        device_number(loss, "loss", device, loss_on_device),
                        device_number(grad_square, "grad_square", device, square_on_device),
                        counts ? counts->data_ptr<double>() : nullptr};
  const AdamOptions options{step,     lr,          beta1,        beta2,
                            eps,      eps_in_root, weight_decay, decoupled_weight_decay,
                            maximize, 1.0};
  launch_adam(call.segments(tensors), state, options, call.workspace(workspace_size(1)),
              call.stream());
  call.check_launch();
  tensors.params_changed();
  for (const at::Tensor& changed : {exp_avg, exp_avg_sq, stats}) bump_version(changed);
  if (max_exp_avg_sq) bump_version(*max_exp_avg_sq);
  if (step_tensor) bump_version(*step_tensor);
  if (counts) bump_version(*counts);
}

// The ring's tensors, checked. Only kernels read its scalars.
History ring_of(const at::Tensor& history, const std::optional<at::Tensor>& scales,
                const at::Tensor& scalars, const at::Device& device) {
  on_device(history, "history", device);
  on_device(scalars, "scalars", device);
  if (scales) on_device(*scales, "history_scale", device);
  return History(history, scales, scalars, Reader::kernels);
}

Ring kernel_ring(const History& history) {
  const LbfgsScalars scalars = history.scalars();
  TORCH_CHECK_VALUE(scalars.slots <= most_slots(), "history has ", scalars.slots,
                    " slots; the CUDA kernels take at most ", most_slots());
  const Row first = history.s_row(0);
  return {static_cast<char*>(first.data),
          first.scales,
          history.side_bytes(),
          history.slot_bytes(),
          history.side_scales(),
          history.slot_scales(),
          history.numel(),
          history.row_dtype(),
          scalars};
}

void grad_stats(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                at::ArrayRef<double> weight_decay, bool maximize,
                const std::optional<at::Tensor>& history, const std::optional<at::Tensor>& scalars,
                at::Tensor stats, const std::optional<at::Tensor>& history_scale) {
  TORCH_CHECK_VALUE(history.has_value() == scalars.has_value(),
                    "history and scalars must be given together");
  check_flat(stats, "stats", kGradStats, at::kDouble);
  const at::Device device = device_of(params, stats);
  on_device(stats, "stats", device);
  std::int64_t numel = std::numeric_limits<std::int64_t>::max();
  Ring ring{};
  if (history) {
    ring = kernel_ring(ring_of(*history, history_scale, *scalars, device));
    numel = ring.numel;
  }
  const DeviceCall call(device);
  const auto is_double = [](const at::Tensor& t) { return t.scalar_type() == at::kDouble; };
  const bool any_double = std::any_of(params.begin(), params.end(), is_double) ||
                          std::any_of(grads.begin(), grads.end(), is_double);
  const at::ScalarType dtype = any_double ? at::kDouble : at::kFloat;
  const TensorSegments tensors(params, grads, offsets, numel, dtype, {weight_decay, {}});
  launch_grad_stats(call.segments(tensors), kernel_dtype(dtype), maximize,
                    history ? &ring : nullptr, stats.data_ptr<double>(),
                    call.workspace(workspace_size(kGradStats)), call.stream());
  call.check_launch();
  bump_version(stats);
}

// What the two passes over the history have in common.
struct Pass {
  Pass(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
       const TensorSegments::Options& options, const at::Tensor& history_tensor,
       const std::optional<at::Tensor>& history_scale, const std::optional<at::Tensor>& grad_prev,
       const at::Tensor& scalars, const std::optional<at::Tensor>& control_tensor)
      : device(device_of(params, history_tensor)),
        history(ring_of(history_tensor, history_scale, scalars, device)),
        ring(kernel_ring(history)),
        previous(history, grad_prev, control_tensor.has_value()),
        control(control_data(control_tensor)),
        call(device),
        tensors(params, grads, offsets, ring.numel, previous.dtype, options) {
    if (grad_prev) on_device(*grad_prev, "grad_prev", device);
    if (control_tensor) on_device(*control_tensor, "control", device);
  }
  DType dtype() const { return kernel_dtype(previous.dtype); }
  template <class Size>
  Workspace workspace(Size&& size) const {
    return call.workspace(size(dtype(), ring.row_dtype, ring.scalars.slots, ring.numel));
  }

  at::Device device;
  History history;
  Ring ring;
  PreviousGradient previous;
  double* control;
  DeviceCall call;
  TensorSegments tensors;
};

void lbfgs_update(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                  at::ArrayRef<double> weight_decay, bool maximize, at::Tensor history,
                  const std::optional<at::Tensor>& grad_prev, at::Tensor scalars, bool form_pair,
                  const std::optional<at::Tensor>& history_scale,
                  const std::optional<at::Tensor>& control) {
  const Pass pass(params, grads, offsets, {weight_decay, {}}, history, history_scale, grad_prev,
                  scalars, control);
  launch_lbfgs_update(pass.call.segments(pass.tensors), pass.dtype(), maximize, pass.ring,
                      pass.previous.data, form_pair, pass.control,
                      pass.workspace(&update_workspace_size), pass.call.stream());
  pass.call.check_launch();
  bump_version(history);
  bump_version(scalars);
  if (history_scale) bump_version(*history_scale);
  if (control) bump_version(*control);
}

void lbfgs_two_loop(at::Tensor scalars, std::int64_t slots, bool commit, double step_length,
                    double curvature_tol, const std::optional<at::Tensor>& broyden, bool scaled) {
  const LbfgsScalars state = lbfgs_scalars(scalars, slots, Reader::kernels);
  BroydenScalars of{nullptr, slots};
  if (broyden) of = broyden_scalars(*broyden, slots, scalars.device());
  const DeviceCall call(scalars.device());
  launch_lbfgs_two_loop(state, of, commit, step_length, curvature_tol, scaled, call.stream());
  call.check_launch();
  if (broyden) bump_version(*broyden);
  bump_version(scalars);
}

void lbfgs_decide(at::Tensor scalars, std::int64_t slots, at::Tensor control, double lr,
                  double lr_unit, const std::optional<at::Tensor>& lr_tensor,
                  const std::optional<at::Tensor>& loss, double curvature_tol,
                  double tolerance_grad, double tolerance_change, double eps, std::int64_t patience,
                  bool closes_pair) {
  const LbfgsScalars state = lbfgs_scalars(scalars, slots, Reader::kernels);
  const at::Device device = scalars.device();
  double* const numbers = control_data(on_device(control, "control", device));
  const DeviceCall call(device);
  at::Tensor loss_on_device;
  launch_lbfgs_decide(state, numbers,
                      {lr, curvature_tol, tolerance_grad, tolerance_change, eps,
                       static_cast<double>(patience), closes_pair, 0.0},
                      number_in_place(lr_tensor, "lr_tensor", device), lr_unit,
                      device_number(loss, "loss", device, loss_on_device), call.stream());
  call.check_launch();
  bump_version(scalars);
  bump_version(control);
}

void lbfgs_direction(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                     at::ArrayRef<double> weight_decay, at::ArrayRef<double> lr_scale,
                     bool maximize, at::Tensor history, const std::optional<at::Tensor>& grad_prev,
                     at::Tensor scalars, const std::optional<at::Tensor>& history_scale,
                     const std::optional<at::Tensor>& control) {
  const Pass pass(params, grads, offsets, {weight_decay, lr_scale}, history, history_scale,
                  grad_prev, scalars, control);
  const bool scaled =
      std::any_of(lr_scale.begin(), lr_scale.end(), [](double share) { return share != 1.0; });
  launch_lbfgs_direction(pass.call.segments(pass.tensors), pass.dtype(), maximize, scaled,
                         pass.ring, pass.previous.data, pass.control,
                         pass.workspace(&direction_workspace_size), pass.call.stream());
  pass.call.check_launch();
  bump_version(history);
  bump_version(scalars);
  if (history_scale) bump_version(*history_scale);
  if (grad_prev) bump_version(*grad_prev);
}

// What lbfgs_move and fuse_blend have in common.
struct Point {
  Point(at::TensorList params, at::IntArrayRef offsets, const at::Tensor& origin,
        const at::Tensor& history, const std::optional<at::Tensor>& history_scale,
        const at::Tensor& scalars)
      : device(device_of(params, history)),
        ring(kernel_ring(ring_of(history, history_scale, scalars, device))),
        dtype(state_dtype_of(on_device(origin, "origin", device), "origin")),
        call(device),
        tensors(params, offsets, ring.numel, dtype) {
    check_flat(origin, "origin", ring.numel, dtype);
  }

  at::Device device;
  Ring ring;
  at::ScalarType dtype;
  DeviceCall call;
  TensorSegments tensors;
};

void lbfgs_move(at::TensorList params, at::IntArrayRef offsets, at::Tensor origin,
                at::Tensor history, at::Tensor scalars, double step, bool save,
                const std::optional<at::Tensor>& history_scale,
                const std::optional<at::Tensor>& control) {
  Point point(params, offsets, origin, history, history_scale, scalars);
  double* const numbers = control_data(control);
  if (control) on_device(*control, "control", point.device);
  launch_lbfgs_move(point.call.segments(point.tensors), kernel_dtype(point.dtype),
                    origin.data_ptr(), point.ring, step, save, numbers, point.call.stream());
  point.call.check_launch();
  if (control || !save || step != 0.0) point.tensors.params_changed();
  if (control || save) bump_version(origin);
  if (control) bump_version(*control);
}

// Two kernels: what lbfgs_direction leaves is read back from the second-level cache or from memory.
void lbfgs_set_out(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                   at::ArrayRef<double> weight_decay, at::ArrayRef<double> lr_scale, bool maximize,
                   at::Tensor history, const std::optional<at::Tensor>& grad_prev,
                   at::Tensor scalars, at::Tensor origin, double step,
                   const std::optional<at::Tensor>& history_scale) {
  const Pass pass(params, grads, offsets, {weight_decay, lr_scale}, history, history_scale,
                  grad_prev, scalars, std::nullopt);  // before anything is written
  check_flat(on_device(origin, "origin", pass.device), "origin", pass.ring.numel,
             pass.previous.dtype);
  lbfgs_direction(params, grads, offsets, weight_decay, lr_scale, maximize, history, grad_prev,
                  scalars, history_scale, std::nullopt);
  lbfgs_move(params, offsets, origin, history, scalars, step, true, history_scale, std::nullopt);
}

void dense_direction(const at::Tensor& grad, at::Tensor grad_prev, at::Tensor direction,
                     at::Tensor matrix, at::Tensor vectors, at::Tensor matrix_scalars,
                     at::Tensor scalars, const std::optional<at::Tensor>& lr_scale,
                     std::optional<double> pair_step, double curvature_tol,
                     std::int64_t taking_part, bool broyden, bool self_scaling) {
  const DenseArguments of(grad, grad_prev, direction, matrix, vectors, matrix_scalars, scalars,
                          lr_scale, Reader::kernels);
  const DeviceCall call(grad.device());
  const DensePair pair{pair_step.has_value(), pair_step.value_or(0.0), curvature_tol};
  // Given back as soon as the kernels are launched: in stream order nobody has it before they end.
  const at::Tensor memory =
      at::empty({dense_memory_size(of.numel, pair.offered)}, matrix.options());
  launch_dense_direction(
      {kernel_dtype(of.dtype), grad.const_data_ptr(),
       lr_scale ? lr_scale->const_data_ptr() : nullptr, grad_prev.data_ptr(), direction.data_ptr(),
       of.matrix, of.vectors, of.numbers, of.head, of.numel, of.stride, of.most_terms},
      pair, {taking_part, broyden, self_scaling}, memory.data_ptr<double>(),
      call.workspace(workspace_size(3)), call.stream());
  call.check_launch();
  for (const at::Tensor& changed :
       {grad_prev, direction, matrix, vectors, matrix_scalars, scalars}) {
    bump_version(changed);
  }
}

void fuse_blend(at::TensorList params, at::IntArrayRef offsets, at::Tensor origin,
                at::Tensor history, at::Tensor scalars, double theta, double step,
                const std::optional<at::Tensor>& history_scale) {
  Point point(params, offsets, origin, history, history_scale, scalars);
  launch_fuse_blend(point.call.segments(point.tensors), kernel_dtype(point.dtype),
                    origin.data_ptr(), point.ring, theta, step,
                    point.call.workspace(workspace_size(1)), point.call.stream());
  point.call.check_launch();
  point.tensors.params_changed();
  bump_version(history);
  bump_version(scalars);
  if (history_scale) bump_version(*history_scale);
}

void grad_gather(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                 at::Tensor flat) {
  const at::ScalarType dtype = state_dtype_of(flat, "flat");
  check_flat(flat, "flat", flat.numel(), dtype);
  on_device(flat, "flat", device_of(params, flat));
  const DeviceCall call(flat.device());
  const TensorSegments tensors(params, grads, offsets, flat.numel(), dtype, {});
  launch_grad_gather(call.segments(tensors), kernel_dtype(dtype), flat.data_ptr(), call.stream());
  call.check_launch();
  bump_version(flat);
}

void grad_scatter(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                  at::Tensor flat) {
  const at::ScalarType dtype = state_dtype_of(flat, "flat");
  check_flat(flat, "flat", flat.numel(), dtype);
  on_device(flat, "flat", device_of(params, flat));
  const DeviceCall call(flat.device());
  TensorSegments tensors(params, grads, offsets, flat.numel(), dtype,
                         {.weight_decay = {}, .lr_scale = {}, .writes_grads = true});
  launch_grad_scatter(call.segments(tensors), kernel_dtype(dtype), flat.data_ptr(), call.stream());
  call.check_launch();
  tensors.grads_changed();
}

}  // namespace

void register_ops(torch::Library& m) {
  m.impl("adam_step", &adam_step);
  m.impl("grad_stats", &grad_stats);
  m.impl("lbfgs_update", &lbfgs_update);
  m.impl("lbfgs_two_loop", &lbfgs_two_loop);
  m.impl("lbfgs_decide", &lbfgs_decide);
  m.impl("lbfgs_direction", &lbfgs_direction);
  m.impl("lbfgs_set_out", &lbfgs_set_out);
  m.impl("lbfgs_move", &lbfgs_move);
  m.impl("dense_direction", &dense_direction);
  m.impl("fuse_blend", &fuse_blend);
  m.impl("grad_gather", &grad_gather);
  m.impl("grad_scatter", &grad_scatter);
}

}  // namespace fuse_ext::cuda
