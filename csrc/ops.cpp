// The schema of every op, once, and the extension module with its build facts.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "bound_ops.h"
#include "broyden.h"
#include "broyden_pairs.h"
#include "cpu/kernels.h"
#include "fixed_step.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

TORCH_LIBRARY(fuse_ext, m) {
  // params, grads: the user's tensors; offsets: where each begins in the flat
  // state, whose dtype (float32 or float64) is the arithmetic's. Moments in
  // bfloat16 are rounded at random (stochastic.h), the arithmetic is float32.
  m.def(
      "adam_step(Tensor(a!)[] params, Tensor[] grads, int[] offsets, "
      "Tensor(b!) exp_avg, "
      "Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, Tensor(e!) stats, "
      "*, int step, "
      "float lr, float beta1, float beta2, float eps, float eps_in_root, "
      "float weight_decay, "
      "bool decoupled_weight_decay, bool maximize, Tensor? grad_scale=None, "
      "Tensor? found_inf=None, Tensor(f!)? step_tensor=None, Tensor? lr_tensor=None, "
      "Tensor? loss=None, Tensor? grad_square=None, Tensor(g!)? counts=None) -> ()");
  // The L-BFGS ops share: history [2, slots, numel] and, where it is int8,
  // history_scale [2, slots, numel / 128], grad_prev (absent: the open slot's Y
  // row), scalars (two_loop.h), weight_decay per tensor; and control
  // (fixed_step.h), with which the device decides what the host would say.
  m.def(
      "grad_stats(Tensor[] params, Tensor[] grads, int[] offsets, float[] "
      "weight_decay, "
      "bool maximize, Tensor? history, Tensor? scalars, Tensor(a!) stats, *, "
      "Tensor? history_scale=None) -> ()");
  m.def(
      "lbfgs_update(Tensor[] params, Tensor[] grads, int[] offsets, float[] "
      "weight_decay, "
      "bool maximize, Tensor(a!) history, Tensor? grad_prev, Tensor(b!) "
      "scalars, "
      "bool form_pair, *, Tensor(c!)? history_scale=None, Tensor(d!)? control=None) -> ()");
  m.def(
      "lbfgs_two_loop(Tensor(a!) scalars, int slots, bool commit, float "
      "step_length, "
      "float curvature_tol, *, Tensor(b!)? broyden=None, bool scaled=False) -> ()");
  m.def(
      "lbfgs_decide(Tensor(a!) scalars, int slots, Tensor(b!) control, *, "
      "float lr, float lr_unit, Tensor? lr_tensor, Tensor? loss, float curvature_tol, "
      "float tolerance_grad, float tolerance_change, float eps, int patience, "
      "bool closes_pair) -> ()");
  m.def(
      "lbfgs_direction(Tensor[] params, Tensor[] grads, int[] offsets, "
      "float[] weight_decay, "
      "float[] lr_scale, bool maximize, Tensor(a!) history, Tensor(b!)? "
      "grad_prev, "
      "Tensor(c!) scalars, *, Tensor(d!)? history_scale=None, Tensor? control=None) -> ()");
  m.def(
      "lbfgs_set_out(Tensor(a!)[] params, Tensor[] grads, int[] offsets, "
      "float[] weight_decay, "
      "float[] lr_scale, bool maximize, Tensor(b!) history, Tensor(c!)? "
      "grad_prev, "
      "Tensor(d!) scalars, Tensor(e!) origin, float step, *, "
      "Tensor(f!)? history_scale=None) -> ()");
  m.def(
      "lbfgs_move(Tensor(a!)[] params, int[] offsets, Tensor(b!) origin, "
      "Tensor history, "
      "Tensor scalars, float step, bool save, *, Tensor? history_scale=None, "
      "Tensor(c!)? control=None) -> ()");
  // All flat: grad (effective), grad_prev, direction and lr_scale in the state's dtype; matrix,
  // vectors and matrix_scalars as in broyden.h, float64; scalars of a ring of one pair, whose
  // header alone is read and written.
  m.def(
      "dense_direction(Tensor grad, Tensor(a!) grad_prev, Tensor(b!) direction, Tensor(c!) matrix, "
      "Tensor(d!) vectors, Tensor(e!) matrix_scalars, Tensor(f!) scalars, Tensor? lr_scale, "
      "float? pair_step, float curvature_tol, int taking_part, bool broyden, bool self_scaling) "
      "-> ()");
  m.def(
      "fuse_blend(Tensor(a!)[] params, int[] offsets, Tensor origin, "
      "Tensor(b!) history, "
      "Tensor(c!) scalars, float theta, float step, *, "
      "Tensor(d!)? history_scale=None) -> ()");
  m.def(
      "grad_gather(Tensor[] params, Tensor[] grads, int[] offsets, "
      "Tensor(a!) flat) -> ()");
  m.def(
      "grad_scatter(Tensor[] params, Tensor(a!)[] grads, int[] offsets, "
      "Tensor flat) -> ()");
}

namespace fuse_ext {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["version"] = FUSE_EXT_VERSION;
  info["torch"] = FUSE_EXT_TORCH_VERSION;
#if defined(FUSE_EXT_WITH_CUDA)
  info["cuda"] = FUSE_EXT_CUDA_VERSION;
  info["cuda_archs"] = FUSE_EXT_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  info["cpu_level"] = cpu_kernels().level;
  return info;
}

// Where the named scalars and arrays of two_loop.h lie, for the Python twin:
// name -> index, or name -> (offset, length).
py::dict scalar_layout(std::int64_t slots) {
  py::dict layout;
  const char* headers[] = {"count",        "open",          "gamma",        "direction_dot_grad",
                           "direction_sq", "direction_max", "accepted",     "skipped",
                           "pair_cosine",  "y_dot_y",       "self_scaling", "usable",
                           "set"};
  static_assert(sizeof headers / sizeof *headers == kSet + 1);
  for (int i = 0; i <= kSet; ++i) layout[headers[i]] = i;
  const char* arrays[] = {"row_scale", "grad_s",  "grad_y",   "y_s",    "y_y",
                          "coef_s",    "coef_y",  "coef_g",   "growth", "grown",
                          "gram_sy",   "gram_yy", "pair_set", "chosen"};
  static_assert(sizeof arrays / sizeof *arrays == kScalarArrays);
  for (int i = 0; i < kScalarArrays; ++i) {
    const auto array = static_cast<ScalarArray>(i);
    layout[arrays[i]] =
        py::make_tuple(scalar_offset(array, slots), scalar_array_size(array, slots));
  }
  layout["size"] = scalar_offset(kScalarArrays, slots);
  layout["size_without_sets"] = scalar_offset(kPairSet, slots);  // in older checkpoints
  return layout;
}

// The same of broyden_pairs.h.
py::dict broyden_layout(std::int64_t slots) {
  py::dict layout;
  const char* headers[] = {"taking_part", "runs",    "made_by",      "held",
                           "held_run",    "initial", "inverse_unit", "direct_unit"};
  static_assert(sizeof headers / sizeof *headers == kDirectUnit + 1);
  for (int i = 0; i <= kDirectUnit; ++i) layout[headers[i]] = i;
  const char* arrays[] = {"run",           "along_s",       "along_y",    "member",
                          "inverse_terms", "direct_terms",  "scratch",    "gram_ss",
                          "inverse_own",   "inverse_other", "direct_own", "direct_other"};
  static_assert(sizeof arrays / sizeof *arrays == kBroydenArrays);
  for (int i = 0; i < kBroydenArrays; ++i) {
    const auto array = static_cast<BroydenArray>(i);
    layout[arrays[i]] =
        py::make_tuple(broyden_offset(array, slots), broyden_array_size(array, slots));
  }
  layout["size"] = broyden_offset(kBroydenArrays, slots);
  return layout;
}

// Where the named scalars of broyden.h lie for so many parameters, and the sizes around them.
py::dict matrix_layout(std::int64_t numel) {
  py::dict layout;
  const char* names[] = {"scale", "terms", "pairs", "known", "exact"};
  static_assert(sizeof names / sizeof *names == kExact + 1);
  for (int i = 0; i <= kExact; ++i) layout[names[i]] = i;
  layout["header"] = static_cast<int>(kMatrixHeader);
  layout["term_size"] = kTermSize;
  layout["most_terms"] = kMostTerms;
  layout["tile"] = kTile;
  layout["size"] = matrix_size(numel);
  return layout;
}

// Where the named numbers of fixed_step.h lie in `control`: name -> index.
py::dict control_layout() {
  py::dict layout;
  const char* names[] = {
      "pair_step", "move",        "step_length", "slope_tolerance", "reset",         "taken",
      "reason",    "grad_square", "grad_sum",    "grad_largest",    "param_largest", "bad_starts",
      "cuts",      "n_iter",      "non_finite",  "resets",          "step_cuts"};
  static_assert(sizeof names / sizeof *names == kControlSize);
  for (int i = 0; i < kControlSize; ++i) layout[names[i]] = i;
  return layout;
}

// Asks the system for large pages under [address, address + bytes): fewer TLB
// misses when 2 m rows stream at once. Advice only; false where there is none
// to give.
bool advise_large_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kLargePage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const std::uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  static_cast<void>(address), static_cast<void>(bytes);
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts of fuse_ext; importing it registers torch.ops.fuse_ext.";
  m.def("build_info", &build_info);
  m.def("scalar_layout", &scalar_layout, py::arg("slots"));
  m.def("broyden_layout", &broyden_layout, py::arg("slots"));
  m.def("control_layout", &control_layout);
  m.def("matrix_layout", &matrix_layout, py::arg("numel"));
  m.def("advise_large_pages", &advise_large_pages, py::arg("address"), py::arg("bytes"));
  define_bound_ops(m);
}

}  // namespace fuse_ext
