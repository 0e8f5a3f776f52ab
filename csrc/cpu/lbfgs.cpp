// The L-BFGS ops for CPU tensors.
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../adapters.h"
#include "parallel.h"

namespace fuse_ext {
namespace {

template <class Function>
void with_state_type(at::ScalarType dtype, Function&& function) {
  if (dtype == at::kDouble) {
    function(double{});
  } else {
    function(float{});
  }
}

// Whether a closure leaves the parameters in the caches of the calling thread's core: together they
// fit there, and torch's own operators run on that thread for tensors below their grain.
bool lie_with_caller(const SegmentTable& table, std::int64_t numel) {
  constexpr std::int64_t kInItsCaches = std::int64_t{1} << 18;
  return numel <= kInItsCaches &&
         std::all_of(table.segments, table.segments + table.count,
                     [](const Segment& s) { return s.numel < at::internal::GRAIN_SIZE; });
}

// What a pass had better store past the caches.
PastCaches past_caches(const SegmentTable& table, std::int64_t numel, at::ScalarType dtype,
                       const Pass& pass) {
  constexpr std::int64_t kFar = std::int64_t{32} << 20;
  if (numel * static_cast<std::int64_t>(at::elementSize(dtype)) >= kFar) return PastCaches::vectors;
  const bool elsewhere = lie_with_caller(table, numel) && takes_threads(numel, pass);
  return elsewhere ? PastCaches::params : PastCaches::nothing;
}

// kGradStats numbers; `direction` may be null.
void stats_of(const TensorSegments& segments, at::ScalarType dtype, bool maximize,
              const Row* direction, double* out) {
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T sign = maximize ? T(-1) : T(1);
    const Pass pass{.vectors = direction ? 2 : 1, .width = kGradStats, .maxima = 1};
    run_chunks(segments.begin(), segments.end(), pass, out,
               [&](std::int64_t begin, std::int64_t end, double* part) {
      cpu_kernels().of<T>().grad_stats(segments.table(), begin, end, sign, direction, part);
    });
  });
}

void grad_stats(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                at::ArrayRef<double> weight_decay, bool maximize,
                const std::optional<at::Tensor>& history, const std::optional<at::Tensor>& scalars,
                at::Tensor stats, const std::optional<at::Tensor>& history_scale) {
  TORCH_CHECK_VALUE(history.has_value() == scalars.has_value(),
                    "history and scalars must be given together");
  check_flat(stats, "stats", kGradStats, at::kDouble);
  std::int64_t numel = std::numeric_limits<std::int64_t>::max();
  std::optional<Row> direction;
  if (history) {
    const History ring(*history, history_scale, *scalars);
    numel = ring.numel();
    direction = ring.open_row();
  }
  const auto is_double = [](const at::Tensor& t) { return t.scalar_type() == at::kDouble; };
  const bool any_double = std::any_of(params.begin(), params.end(), is_double) ||
                          std::any_of(grads.begin(), grads.end(), is_double);
  const at::ScalarType dtype = any_double ? at::kDouble : at::kFloat;
  const TensorSegments segments(params, grads, offsets, numel, dtype, {weight_decay, {}});
  stats_of(segments, dtype, maximize, direction ? &*direction : nullptr, stats.data_ptr<double>());
  bump_version(stats);
}

// How a pass reads its rows. Rows of no more than `cached` bytes lie in a cache; others are fetched
// so many bytes ahead, by measurement on rows of the state's dtype and on narrower ones.
struct Reading {
  std::int64_t cached, ahead, narrow_ahead;
};
// Pass 2 follows on pass 1, which has left its rows in the third level; before pass 1 a closure may
// have driven them out of there. (From the third level reading ahead costs 2 to 15%, from the
// memory it saves 30%.)
constexpr Reading kPass1{std::int64_t{1} << 20, 8192, 8192};
constexpr Reading kPass2{std::int64_t{16} << 20, 1024, 2048};

// Rows of the ring, newest pair first, S and Y alternating, and the slots they belong to.
struct RingRows {
  std::vector<Row> rows;
  std::vector<std::int64_t> slots;

  // What comes from the memory is read ahead: where a block of a row ends the processor's own
  // prefetching has to start anew. What already lies in a cache would only be looked up twice.
  Rows view(std::int64_t row_bytes, const Reading& reading) const {
    const std::int64_t count = static_cast<std::int64_t>(rows.size());
    if (count * row_bytes <= reading.cached) return {rows.data(), count, 0};
    const bool narrow = rows[0].dtype != DType::f32 && rows[0].dtype != DType::f64;
    return {rows.data(), count, narrow ? reading.narrow_ahead : reading.ahead};
  }

  explicit RingRows(const History& ring) {
    const LbfgsScalars scalars = ring.scalars();
    const std::size_t count = static_cast<std::size_t>(scalars.count());
    rows.reserve(2 * count + 2);  // and the open one
    slots.reserve(count + 1);
    for (std::int64_t age = 0; age < scalars.count(); ++age) add(ring, scalars.slot(age));
  }

  void add(const History& ring, std::int64_t slot) {
    rows.push_back(ring.s_row(slot));
    rows.push_back(ring.y_row(slot));
    slots.push_back(slot);
  }
};

// The norms that decide_step wants.
void measure(const TensorSegments& segments, at::ScalarType dtype, bool maximize,
             const LbfgsScalars& state, double* control) {
  double stats[kGradStats];
  stats_of(segments, dtype, maximize, nullptr, stats);
  control[kGradSquare] = stats[kGradSq];
  control[kGradSum] = stats[kGradAbsSum];
  control[kGradLargest] = stats[kGradAbsMax];
  if (usable_pairs(state, 1) > 0) return;
  with_state_type(dtype, [&](auto zero) {
    const Pass pass{.vectors = 1, .width = 1, .maxima = 1};
    run_chunks(segments.begin(), segments.end(), pass, control + kParamLargest,
               [&](std::int64_t begin, std::int64_t end, double* out) {
      cpu_kernels().of<decltype(zero)>().largest_param(segments.table(), begin, end, out);
    });
  });
}

void lbfgs_update(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                  at::ArrayRef<double> weight_decay, bool maximize, at::Tensor history,
                  const std::optional<at::Tensor>& grad_prev, at::Tensor scalars, bool form_pair,
                  const std::optional<at::Tensor>& history_scale,
                  const std::optional<at::Tensor>& control) {
  const History ring(history, history_scale, scalars);
  const PreviousGradient previous(ring, grad_prev, control.has_value());
  double* const decided = control_data(control);
  if (decided != nullptr) form_pair = decided[kPairStep] != 0.0;
  const TensorSegments segments(params, grads, offsets, ring.numel(), previous.dtype,
                                {weight_decay, {}});
  const LbfgsScalars state = ring.scalars();
  if (decided != nullptr) measure(segments, previous.dtype, maximize, state, decided);
  const std::int64_t open = state.open();
  RingRows list(ring);
  if (form_pair) list.add(ring, open);  // y as any row, so that a pass repeated has the same bits
  const Rows rows = list.view(ring.slot_bytes(), kPass1);
  std::vector<double> sums(static_cast<std::size_t>(2 * rows.count));
  with_state_type(previous.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T sign = maximize ? T(-1) : T(1);
    const Row y_row = ring.y_row(open);
    const Pass pass{.vectors = rows.count + 3, .width = 2 * rows.count};
    run_chunks(0, ring.numel(), pass, sums.data(),
               [&](std::int64_t begin, std::int64_t end, double* out) {
      cpu_kernels().of<T>().dots(segments.table(), begin, end, sign,
                                 static_cast<const T*>(previous.data), form_pair ? &y_row : nullptr,
                                 rows, out);
    });
  });
  const double *dot_g = sums.data(), *dot_y = dot_g + rows.count;
  double *grad_s = state.array(kGradS), *grad_y = state.array(kGradY), *y_s = state.array(kYS),
         *y_y = state.array(kYY);
  for (std::size_t i = 0; i < list.slots.size(); ++i) {
    const std::int64_t slot = list.slots[i];
    grad_s[slot] = dot_g[2 * i];
    grad_y[slot] = dot_g[2 * i + 1];
    if (!form_pair) continue;
    y_s[slot] = dot_y[2 * i];
    y_y[slot] = dot_y[2 * i + 1];
  }
  if (form_pair) state[kYDotY] = y_y[open];
  bump_version(history);
  bump_version(scalars);
  if (history_scale) bump_version(*history_scale);
  if (control) bump_version(*control);
}

// Scalars only: the recursion on the Gram matrix, after closing the open pair if asked to.
void lbfgs_two_loop(at::Tensor scalars, std::int64_t slots, bool commit, double step_length,
                    double curvature_tol, const std::optional<at::Tensor>& broyden, bool scaled) {
  const LbfgsScalars state = lbfgs_scalars(scalars, slots);
  if (broyden) {
    const BroydenScalars of = broyden_scalars(*broyden, slots, scalars.device());
    const bool fresh = commit && commit_broyden_pair(state, of, step_length, curvature_tol);
    broyden_recursion(state, of, step_length, fresh, scaled);
    bump_version(*broyden);
  } else {
    if (commit) commit_pair(state, step_length, curvature_tol);
    two_loop(state);
  }
  bump_version(scalars);
}

void lbfgs_decide(at::Tensor scalars, std::int64_t slots, at::Tensor control, double lr,
                  double lr_unit, const std::optional<at::Tensor>& lr_tensor,
                  const std::optional<at::Tensor>& loss, double curvature_tol,
                  double tolerance_grad, double tolerance_change, double eps, std::int64_t patience,
                  bool closes_pair) {
  const LbfgsScalars state = lbfgs_scalars(scalars, slots);
  double* const numbers = control_data(control);
  if (lr_tensor) {
    check_number(*lr_tensor, "lr_tensor", scalars.device());
    lr *= lr_tensor->item<double>() / lr_unit;
  }
  TORCH_CHECK_VALUE(!loss || loss->numel() == 1, "loss has ", loss ? loss->numel() : 0,
                    " elements, not one");
  decide_step(state, numbers,
              {lr, curvature_tol, tolerance_grad, tolerance_change, eps,
               static_cast<double>(patience), closes_pair, loss ? loss->item<double>() : 0.0});
  bump_version(scalars);
  bump_version(control);
}

// Pass 2; with an origin, params = origin + step * p as well, after origin <- params.
void take_direction(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                    at::ArrayRef<double> weight_decay, at::ArrayRef<double> lr_scale, bool maximize,
                    const at::Tensor& history, const std::optional<at::Tensor>& grad_prev,
                    const at::Tensor& scalars, const std::optional<at::Tensor>& history_scale,
                    const std::optional<at::Tensor>& control,
                    const std::optional<at::Tensor>& origin, double step) {
  const History ring(history, history_scale, scalars);
  const PreviousGradient previous(ring, grad_prev, control.has_value());
  const double* const decided = control_data(control);
  if (origin) check_flat(*origin, "origin", ring.numel(), previous.dtype);
  TensorSegments segments(params, grads, offsets, ring.numel(), previous.dtype,
                          {weight_decay, lr_scale});
  if (decided != nullptr && decided[kMove] != kGo) return;
  const LbfgsScalars state = ring.scalars();
  const RingRows list(ring);
  const Rows rows = list.view(ring.slot_bytes(), kPass2);
  std::vector<double> coefs;
  coefs.reserve(list.rows.size());
  for (const std::int64_t slot : list.slots) {
    coefs.push_back(state.array(kCoefS)[slot]);
    coefs.push_back(state.array(kCoefY)[slot]);
  }
  double sums[kDirectionStats];
  const Pass pass{.vectors = rows.count + (origin ? 6 : 3), .width = kDirectionStats, .maxima = 1};
  const PastCaches past = past_caches(segments.table(), ring.numel(), previous.dtype, pass);
  with_state_type(previous.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T sign = maximize ? T(-1) : T(1);
    T* const from = origin ? origin->data_ptr<T>() : nullptr;
    run_chunks(0, ring.numel(), pass, sums, [&](std::int64_t begin, std::int64_t end, double* out) {
      cpu_kernels().of<T>().combine(segments.table(), begin, end, sign, rows, coefs.data(),
                                    *state.array(kCoefG), ring.open_row(),
                                    static_cast<T*>(previous.data), from, step, past, out);
    });
  });
  state[kDirectionDotGrad] = sums[kDotGrad];
  state[kDirectionSq] = sums[kSq];
  state[kDirectionMax] = sums[kMax];
  bump_version(history);
  bump_version(scalars);
  if (history_scale) bump_version(*history_scale);
  if (grad_prev) bump_version(*grad_prev);
  if (!origin) return;
  bump_version(*origin);
  if (step != 0.0) segments.params_changed();
}

void lbfgs_direction(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                     at::ArrayRef<double> weight_decay, at::ArrayRef<double> lr_scale,
                     bool maximize, at::Tensor history, const std::optional<at::Tensor>& grad_prev,
                     at::Tensor scalars, const std::optional<at::Tensor>& history_scale,
                     const std::optional<at::Tensor>& control) {
  take_direction(params, grads, offsets, weight_decay, lr_scale, maximize, history, grad_prev,
                 scalars, history_scale, control, std::nullopt, 0.0);
}

void lbfgs_set_out(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                   at::ArrayRef<double> weight_decay, at::ArrayRef<double> lr_scale, bool maximize,
                   at::Tensor history, const std::optional<at::Tensor>& grad_prev,
                   at::Tensor scalars, at::Tensor origin, double step,
                   const std::optional<at::Tensor>& history_scale) {
  take_direction(params, grads, offsets, weight_decay, lr_scale, maximize, history, grad_prev,
                 scalars, history_scale, std::nullopt, origin, step);
}

void lbfgs_move(at::TensorList params, at::IntArrayRef offsets, at::Tensor origin,
                at::Tensor history, at::Tensor scalars, double step, bool save,
                const std::optional<at::Tensor>& history_scale,
                const std::optional<at::Tensor>& control) {
  const History ring(history, history_scale, scalars);
  double* const decided = control_data(control);
  const at::ScalarType dtype = state_dtype_of(origin, "origin");
  check_flat(origin, "origin", ring.numel(), dtype);
  TensorSegments segments(params, offsets, ring.numel(), dtype);
  bool stay = false;
  if (decided != nullptr) {
    const MoveOrder order = move_order(ring.scalars(), decided);
    stay = order.stay, step = order.step, save = order.save;
  }
  if (!stay) {
    const Pass pass{.vectors = save ? 4 : 3};
    const PastCaches past = past_caches(segments.table(), ring.numel(), dtype, pass);
    with_state_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      double none;
      run_chunks(0, ring.numel(), pass, &none, [&](std::int64_t begin, std::int64_t end, double*) {
        cpu_kernels().of<T>().move(segments.table(), begin, end, origin.data_ptr<T>(),
                                   ring.open_row(), step, save, past);
      });
    });
    if (!save || step != 0.0) segments.params_changed();
    if (save) bump_version(origin);
  }
  if (decided == nullptr) return;
  note_move(ring.scalars(), decided);
  bump_version(*control);
}

void fuse_blend(at::TensorList params, at::IntArrayRef offsets, at::Tensor origin,
                at::Tensor history, at::Tensor scalars, double theta, double step,
                const std::optional<at::Tensor>& history_scale) {
  const History ring(history, history_scale, scalars);
  const at::ScalarType dtype = state_dtype_of(origin, "origin");
  check_flat(origin, "origin", ring.numel(), dtype);
  TensorSegments segments(params, offsets, ring.numel(), dtype);
  double taken_sq = 0;
  with_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Pass pass{.vectors = 5, .width = 1};
    run_chunks(0, ring.numel(), pass, &taken_sq,
               [&](std::int64_t begin, std::int64_t end, double* out) {
      cpu_kernels().of<T>().blend(segments.table(), begin, end, origin.data_ptr<T>(),
                                  ring.open_row(), theta, step, out);
    });
  });
  ring.scalars()[kDirectionSq] = taken_sq;
  segments.params_changed();
  bump_version(history);
  bump_version(scalars);
  if (history_scale) bump_version(*history_scale);
}

template <class T>
void copy_grads(const TensorSegments& segments, const at::Tensor& flat, bool to_flat) {
  double none;
  T* values = flat.data_ptr<T>();
  const Pass pass{.vectors = 2};
  run_chunks(0, flat.numel(), pass, &none, [&](std::int64_t begin, std::int64_t end, double*) {
    const StateKernels<T>& kernels = cpu_kernels().of<T>();
    if (to_flat) {
      kernels.gather(segments.table(), begin, end, values);
    } else {
      kernels.scatter(segments.table(), begin, end, values);
    }
  });
}

void grad_gather(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                 at::Tensor flat) {
  const at::ScalarType dtype = state_dtype_of(flat, "flat");
  check_flat(flat, "flat", flat.numel(), dtype);
  const TensorSegments segments(params, grads, offsets, flat.numel(), dtype, {});
  with_state_type(dtype, [&](auto zero) { copy_grads<decltype(zero)>(segments, flat, true); });
  bump_version(flat);
}

void grad_scatter(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                  at::Tensor flat) {
  const at::ScalarType dtype = state_dtype_of(flat, "flat");
  check_flat(flat, "flat", flat.numel(), dtype);
  TensorSegments segments(params, grads, offsets, flat.numel(), dtype,
                          {.weight_decay = {}, .lr_scale = {}, .writes_grads = true});
  with_state_type(dtype, [&](auto zero) { copy_grads<decltype(zero)>(segments, flat, false); });
  segments.grads_changed();
}

void register_ops(torch::Library& m) {
  m.impl("grad_stats", &grad_stats);
  m.impl("lbfgs_update", &lbfgs_update);
  m.impl("lbfgs_two_loop", &lbfgs_two_loop);
  m.impl("lbfgs_decide", &lbfgs_decide);
  m.impl("lbfgs_direction", &lbfgs_direction);
  m.impl("lbfgs_set_out", &lbfgs_set_out);
  m.impl("lbfgs_move", &lbfgs_move);
  m.impl("fuse_blend", &fuse_blend);
  m.impl("grad_gather", &grad_gather);
  m.impl("grad_scatter", &grad_scatter);
}

}  // namespace

// Also for sparse tensors: the check in adapters.cpp says more than the dispatcher's refusal.
TORCH_LIBRARY_IMPL(fuse_ext, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(fuse_ext, SparseCPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(fuse_ext, SparseCsrCPU, m) { register_ops(m); }

}  // namespace fuse_ext
