// What a step asks of C++, in few and cheap calls: whether the parameters still have the layout of
// the flat state, what their gradients are, and the ops on them without the lists and boxed
// arguments of torch.ops. The ops still go through torch's dispatcher: whichever backend has the
// tensors runs them, and profilers and dispatch modes see them.
#include "bound_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "stats.h"
#include "two_loop.h"

namespace fuse_ext {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<at::Tensor>;

// The numbers at the head of the scalars that the host decides by.
constexpr std::size_t kHead = kUsable + 1;

// Whether torch's own Tensor or Parameter: a subclass may redefine what a gradient is.
bool is_plain(PyObject* object) { return THPVariable_CheckExact(object); }

// The parameters of all groups in flat order, and what each was when the flat state was laid out.
// Tensors are looked up through their Python objects every time: torch may put another tensor
// behind an object (torch.utils.swap_tensors).
class Layout {
 public:
  Layout(const std::vector<py::list>& groups, std::vector<std::int64_t> offsets)
      : offsets_(std::move(offsets)) {
    for (const py::list& group : groups) {
      group_sizes_.push_back(group.size());
      for (const py::handle param : group) {
        plain_ = plain_ && is_plain(param.ptr());
        params_.push_back(py::reinterpret_borrow<py::object>(param));
      }
    }
    if (!plain_) return;
    for (std::size_t i = 0; i < params_.size(); ++i) {
      const at::Tensor& tensor = param(i);
      formats_.push_back(
          {tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type(), tensor.device()});
      real_ = real_ && !tensor.is_complex();
    }
  }

  // Whether the groups hold the same tensors in the same formats. False may also mean that only
  // Python can tell.
  bool unchanged(const py::list& groups) const {
    if (!plain_ || groups.size() != group_sizes_.size()) return false;
    std::size_t i = 0;
    for (std::size_t g = 0; g < group_sizes_.size(); ++g) {
      PyObject* group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(g));
      if (!PyDict_Check(group)) return false;
      PyObject* list = PyDict_GetItemString(group, "params");
      if (list == nullptr || !PyList_Check(list)) return false;
      if (static_cast<std::size_t>(PyList_GET_SIZE(list)) != group_sizes_[g]) return false;
      for (std::size_t k = 0; k < group_sizes_[g]; ++k, ++i) {
        if (PyList_GET_ITEM(list, static_cast<Py_ssize_t>(k)) != params_[i].ptr()) return false;
        if (!formats_[i].fits(param(i))) return false;
      }
    }
    return true;
  }

  // The gradients as a list, or None where one is missing or not dense real memory.
  py::object grads() const {
    if (!plain_ || !real_) return py::none();
    py::list all(params_.size());
    for (std::size_t i = 0; i < params_.size(); ++i) {
      const at::Tensor& grad = param(i).grad();
      if (!grad.defined() || grad.layout() != at::kStrided || grad.is_neg() || grad.is_complex()) {
        return py::none();
      }
      PyList_SET_ITEM(all.ptr(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(grad));
    }
    return all;
  }

  // Version and address of every parameter: what changes when anyone writes to them.
  py::object places() const {
    if (!plain_) return py::none();
    std::vector<std::uint64_t> all;
    all.reserve(2 * params_.size());
    for (std::size_t i = 0; i < params_.size(); ++i) {
      all.push_back(static_cast<std::uint64_t>(param(i)._version()));
      all.push_back(reinterpret_cast<std::uintptr_t>(param(i).const_data_ptr()));
    }
    return py::bytes(reinterpret_cast<const char*>(all.data()), all.size() * sizeof all[0]);
  }

  Tensors params() const {
    Tensors tensors;
    tensors.reserve(params_.size());
    for (std::size_t i = 0; i < params_.size(); ++i) tensors.push_back(param(i));
    return tensors;
  }
  const std::vector<std::int64_t>& offsets() const { return offsets_; }
  // Whether the ops can be called on it: complex parameters must be viewed as real ones before.
  bool has_ops() const { return plain_ && real_; }

 private:
  struct Format {
    std::vector<std::int64_t> sizes, strides;
    at::ScalarType dtype;
    at::Device device;

    bool fits(const at::Tensor& tensor) const {
      return tensor.sizes() == sizes && tensor.strides() == strides &&
             tensor.scalar_type() == dtype && tensor.device() == device;
    }
  };
  const at::Tensor& param(std::size_t i) const { return THPVariable_Unpack(params_[i].ptr()); }

  std::vector<py::object> params_;
  std::vector<std::size_t> group_sizes_;
  std::vector<std::int64_t> offsets_;
  std::vector<Format> formats_;
  bool plain_ = true, real_ = true;
};

// While an op runs: other Python threads may too, and autograd has no part in it.
struct InOp {
  py::gil_scoped_release without_gil;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
};

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The first n doubles of a vector, on the host.
template <std::size_t n>
std::array<double, n> first_numbers(const at::Tensor& vector) {
  const at::Tensor host = vector.is_cpu() ? vector : vector.narrow(0, 0, n).cpu();
  std::array<double, n> numbers;
  std::copy_n(host.const_data_ptr<double>(), n, numbers.begin());
  return numbers;
}

void adam_step(const Layout& layout, const Tensors& grads, const at::Tensor& exp_avg,
               const at::Tensor& exp_avg_sq, const MaybeTensor& max_exp_avg_sq,
               const at::Tensor& stats, const MaybeTensor& grad_scale, std::int64_t step, double lr,
               double beta1, double beta2, double eps, double eps_in_root, double weight_decay,
               bool decoupled_weight_decay, bool maximize) {
  static const auto op = find<void(
      at::TensorList, at::TensorList, at::IntArrayRef, at::Tensor, at::Tensor, const MaybeTensor&,
      at::Tensor, std::int64_t, double, double, double, double, double, double, bool, bool,
      const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
      const MaybeTensor&, const MaybeTensor&, const MaybeTensor&)>("fuse_ext::adam_step");
  const Tensors params = layout.params();
  const InOp scope;
  op.call(params, grads, layout.offsets(), exp_avg, exp_avg_sq, max_exp_avg_sq, stats, step, lr,
          beta1, beta2, eps, eps_in_root, weight_decay, decoupled_weight_decay, maximize,
          grad_scale, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
          std::nullopt);
}

// The norms, and the loss behind them. On a device `stats` is a view of `all`, whose last number
// the loss becomes, so that the host waits once for both.
std::array<double, kGradStats + 1> grad_stats(const Layout& layout, const Tensors& grads,
                                              const Numbers& weight_decay, bool maximize,
                                              const MaybeTensor& history,
                                              const MaybeTensor& scalars, const at::Tensor& stats,
                                              const MaybeTensor& history_scale,
                                              const MaybeTensor& loss, const MaybeTensor& all) {
  static const auto op =
      find<void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, bool,
                const MaybeTensor&, const MaybeTensor&, at::Tensor, const MaybeTensor&)>(
          "fuse_ext::grad_stats");
  const Tensors params = layout.params();
  const InOp scope;
  op.call(params, grads, layout.offsets(), weight_decay, maximize, history, scalars, stats,
          history_scale);
  if (all) {
    if (loss) all->narrow(0, kGradStats, 1).copy_(loss->reshape({1}));
    return first_numbers<kGradStats + 1>(*all);
  }
  std::array<double, kGradStats + 1> numbers{};
  std::ranges::copy(first_numbers<kGradStats>(stats), numbers.begin());
  if (loss) numbers[kGradStats] = loss->item<double>();
  return numbers;
}

// A ring of curvature pairs and the gradients that an op takes to it.
struct RingCall {
  const Layout& layout;
  const Tensors& grads;
  const Numbers& weight_decay;
  bool maximize;
  const at::Tensor& history;
  const MaybeTensor& grad_prev;
  const at::Tensor& scalars;
  const MaybeTensor& history_scale;
  Tensors params = layout.params();

  // Pass 1 and the recursion; to be called in an InOp, as what follows. `scaled`: the direction to
  // come will be multiplied by shares.
  void update(std::optional<double> pair_step, double curvature_tol, const MaybeTensor& broyden,
              bool scaled) const {
    static const auto pass =
        find<void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, bool,
                  at::Tensor, const MaybeTensor&, at::Tensor, bool, const MaybeTensor&,
                  const MaybeTensor&)>("fuse_ext::lbfgs_update");
    static const auto two_loop =
        find<void(at::Tensor, std::int64_t, bool, double, double, const MaybeTensor&, bool)>(
            "fuse_ext::lbfgs_two_loop");
    pass.call(params, grads, layout.offsets(), weight_decay, maximize, history, grad_prev, scalars,
              pair_step.has_value(), history_scale, std::nullopt);
    two_loop.call(scalars, history.size(1), pair_step.has_value(), pair_step.value_or(0.0),
                  curvature_tol, broyden, scaled);
  }

  // Pass 2; the numbers of the scalars' head.
  std::array<double, kHead> direction(const Numbers& lr_scale) const {
    static const auto pass =
        find<void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                  at::ArrayRef<double>, bool, at::Tensor, const MaybeTensor&, at::Tensor,
                  const MaybeTensor&, const MaybeTensor&)>("fuse_ext::lbfgs_direction");
    pass.call(params, grads, layout.offsets(), weight_decay, lr_scale, maximize, history, grad_prev,
              scalars, history_scale, std::nullopt);
    return first_numbers<kHead>(scalars);
  }

  // The same, with the parameters moved by `step`.
  std::array<double, kHead> set_out(const Numbers& lr_scale, const at::Tensor& origin,
                                    double step) const {
    static const auto pass =
        find<void(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                  at::ArrayRef<double>, bool, at::Tensor, const MaybeTensor&, at::Tensor,
                  at::Tensor, double, const MaybeTensor&)>("fuse_ext::lbfgs_set_out");
    pass.call(params, grads, layout.offsets(), weight_decay, lr_scale, maximize, history, grad_prev,
              scalars, origin, step, history_scale);
    return first_numbers<kHead>(scalars);
  }

  void move(const at::Tensor& origin, double step, bool save) const {
    static const auto op =
        find<void(at::TensorList, at::IntArrayRef, at::Tensor, at::Tensor, at::Tensor, double, bool,
                  const MaybeTensor&, const MaybeTensor&)>("fuse_ext::lbfgs_move");
    op.call(params, layout.offsets(), origin, history, scalars, step, save, history_scale,
            std::nullopt);
  }
};

void lbfgs_update(const Layout& layout, const Tensors& grads, const Numbers& weight_decay,
                  bool maximize, const at::Tensor& history, const MaybeTensor& grad_prev,
                  const at::Tensor& scalars, const MaybeTensor& history_scale,
                  std::optional<double> pair_step, double curvature_tol, const MaybeTensor& broyden,
                  bool scaled) {
  const RingCall ring{layout,  grads,     weight_decay, maximize,
                      history, grad_prev, scalars,      history_scale};
  const InOp scope;
  ring.update(pair_step, curvature_tol, broyden, scaled);
}

std::array<double, kHead> lbfgs_direction(const Layout& layout, const Tensors& grads,
                                          const Numbers& weight_decay, const Numbers& lr_scale,
                                          bool maximize, const at::Tensor& history,
                                          const MaybeTensor& grad_prev, const at::Tensor& scalars,
                                          const MaybeTensor& history_scale) {
  const RingCall ring{layout,  grads,     weight_decay, maximize,
                      history, grad_prev, scalars,      history_scale};
  const InOp scope;
  return ring.direction(lr_scale);
}

// Update and direction in one call and, where there is an origin and pairs are usable, the move
// too: without them the step depends on the gradient. Where the direction turns out to be none the
// parameters go back. The last number says whether they have moved.
std::array<double, kHead + 1> lbfgs_update_direction(
    const Layout& layout, const Tensors& grads, const Numbers& weight_decay,
    const Numbers& lr_scale, bool maximize, const at::Tensor& history, const MaybeTensor& grad_prev,
    const at::Tensor& scalars, const MaybeTensor& history_scale, std::optional<double> pair_step,
    double curvature_tol, const MaybeTensor& origin, double step, double least_slope,
    const MaybeTensor& broyden) {
  const RingCall ring{layout,  grads,     weight_decay, maximize,
                      history, grad_prev, scalars,      history_scale};
  const bool scaled = std::ranges::any_of(lr_scale, [](double share) { return share != 1.0; });
  const InOp scope;
  ring.update(pair_step, curvature_tol, broyden, scaled);
  // What is on a device is not waited for: the move follows the head that comes with the direction.
  const bool early = origin && scalars.is_cpu() && scalars.const_data_ptr<double>()[kUsable] > 0;
  const auto head = early ? ring.set_out(lr_scale, *origin, step) : ring.direction(lr_scale);
  const bool moves = origin && head[kUsable] > 0 && -head[kDirectionDotGrad] > least_slope &&
                     std::isfinite(head[kDirectionSq]);
  if (early && !moves) ring.move(*origin, 0.0, false);
  if (moves && !early) ring.move(*origin, step, true);
  std::array<double, kHead + 1> numbers{};
  std::ranges::copy(head, numbers.begin());
  numbers.back() = moves;
  return numbers;
}

void lbfgs_move(const Layout& layout, const at::Tensor& origin, const at::Tensor& history,
                const at::Tensor& scalars, const MaybeTensor& history_scale, double step,
                bool save) {
  const Tensors none;
  const Numbers no_decay;
  const MaybeTensor no_grad;
  const RingCall ring{layout, none, no_decay, false, history, no_grad, scalars, history_scale};
  const InOp scope;
  ring.move(origin, step, save);
}

// Whether a profiler or anything else listens to torch's ranges and ops.
bool is_observed() { return at::hasCallbacks() && at::isRecordFunctionEnabled(); }

}  // namespace

void define_bound_ops(py::module_& m) {
  using torch::wrap_pybind_function;
  py::class_<Layout>(m, "Layout")
      .def(py::init<const std::vector<py::list>&, std::vector<std::int64_t>>(), py::arg("groups"),
           py::arg("offsets"))
      .def_property_readonly("has_ops", &Layout::has_ops)
      .def("unchanged", &Layout::unchanged)
      .def("grads", &Layout::grads)
      .def("places", &Layout::places)
      .def("adam_step", wrap_pybind_function(&adam_step))
      .def("grad_stats", wrap_pybind_function(&grad_stats))
      .def("lbfgs_update", wrap_pybind_function(&lbfgs_update))
      .def("lbfgs_direction", wrap_pybind_function(&lbfgs_direction))
      .def("lbfgs_update_direction", wrap_pybind_function(&lbfgs_update_direction))
      .def("lbfgs_move", wrap_pybind_function(&lbfgs_move));
  m.def("is_observed", &is_observed);
}

}  // namespace fuse_ext
