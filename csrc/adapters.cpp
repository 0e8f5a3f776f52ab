#include "adapters.h"

#include <ATen/MemoryOverlap.h>

namespace fuse_ext {

void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

namespace {

std::optional<DType> known_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: return std::nullopt;
  }
}

bool same_memory_order(const at::Tensor& a, const at::Tensor& b) {
  return a.strides() == b.strides() || (a.is_contiguous() && b.is_contiguous());
}

// A copy of `source` in the memory order of `like`, which is dense.
at::Tensor dense_copy(const at::Tensor& source, const at::Tensor& like) {
  at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), source.options());
  copy.copy_(source);
  return copy;
}

// Checks what holds for every tensor of the lists, and returns its dtype.
DType check_tensor(const at::Tensor& tensor, const char* list, std::size_t i,
                   const at::Device& device) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, list, "[", i, "] has layout ", tensor.layout(),
                   "; only dense tensors are supported");
  TORCH_CHECK_VALUE(tensor.device() == device, list, "[", i, "] is on ", tensor.device(),
                    " but params[0] is on ", device);
  const std::optional<DType> dtype = known_dtype(tensor);
  TORCH_CHECK_TYPE(dtype, list, "[", i, "] has dtype ", tensor.scalar_type(),
                   "; supported are float32, float64, bfloat16 and float16");
  return *dtype;
}

// Elements that share memory have no value of their own to write. As far as torch can tell, and
// before anything is written: copy_ would refuse only at the end.
void check_writable(const at::Tensor& tensor, const char* list, std::size_t i) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, list, "[", i,
                    "] has shape ", tensor.sizes(), " and strides ", tensor.strides(),
                    ": several elements share one place in memory");
}

void check_length(const char* name, std::size_t length, std::size_t params) {
  TORCH_CHECK_VALUE(length == params, name, " has ", length, " entries for ", params, " params");
}

}  // namespace

TensorSegments::TensorSegments(at::TensorList params, const at::TensorList* grads,
                               at::IntArrayRef offsets, std::int64_t numel, at::ScalarType state,
                               const Options& options)
    : params_{params, {}}, grads_{grads ? *grads : at::TensorList{}, {}} {
  const std::size_t n = params.size();
  check_length("offsets", offsets.size(), n);
  if (grads) check_length("grads", grads->size(), n);
  if (!options.weight_decay.empty()) check_length("weight_decay", options.weight_decay.size(), n);
  if (!options.lr_scale.empty()) check_length("lr_scale", options.lr_scale.size(), n);
  segments_.reserve(n);
  std::int64_t free_from = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const at::Tensor& param = params[i];
    Segment segment{};
    segment.param_dtype = check_tensor(param, "params", i, params[0].device());
    segment.grad_dtype = segment.param_dtype;
    TORCH_CHECK_TYPE(segment.param_dtype != DType::f64 || state == at::kDouble, "params[", i,
                     "] has dtype float64 but the state float32, which would round it");
    segment.numel = param.numel();
    TORCH_CHECK_VALUE(offsets[i] >= free_from && offsets[i] <= numel - segment.numel, "offsets[", i,
                      "]=", offsets[i], " does not fit: params[", i, "] has ", segment.numel,
                      " elements, the state ", numel, ", taken up to ", free_from);
    segment.offset = offsets[i];
    free_from = segment.offset + segment.numel;
    const at::Tensor* dense = &param;  // tensors are not held twice: many of them would cost time
    if (!param.is_non_overlapping_and_dense()) {
      check_writable(param, "params", i);
      params_.copies.push_back({i, param.contiguous()});
      dense = &params_.copies.back().dense;
    }
    segment.param = dense->data_ptr();
    segment.weight_decay = options.weight_decay.empty() ? 0.0 : options.weight_decay[i];
    segment.lr_scale = options.lr_scale.empty() ? 1.0 : options.lr_scale[i];
    if (grads) {
      const at::Tensor* grad = &(*grads)[i];
      segment.grad_dtype = check_tensor(*grad, "grads", i, params[0].device());
      TORCH_CHECK_VALUE(grad->sizes() == param.sizes(), "grads[", i, "] has shape ", grad->sizes(),
                        " but params[", i, "] has ", param.sizes());
      if (!same_memory_order(*grad, *dense)) {
        if (options.writes_grads) check_writable(*grad, "grads", i);
        grads_.copies.push_back({i, dense_copy(*grad, *dense)});
        grad = &grads_.copies.back().dense;
      }
      segment.grad = grad->data_ptr();
    }
    if (segment.numel > 0) segments_.push_back(segment);
  }
}

void TensorSegments::write_back(Side& side) {
  // As a kernel's own stores are: no autograd, no version counter but the one below.
  const at::AutoDispatchBelowADInplaceOrView guard;
  for (const Copy& copy : side.copies) side.tensors[copy.index].copy_(copy.dense);
  for (const at::Tensor& tensor : side.tensors) bump_version(tensor);
}

void check_flat(const at::Tensor& tensor, const char* name, std::int64_t numel,
                at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.numel() == numel && tensor.is_contiguous(), name,
                    " has shape ", tensor.sizes(), " and strides ", tensor.strides(),
                    "; expected a contiguous vector of ", numel);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " has dtype ", tensor.scalar_type(),
                   "; expected ", dtype);
}

void check_steps(const at::Tensor& steps, const char* name, const at::Device& device) {
  TORCH_CHECK_VALUE(steps.numel() > 0 && steps.is_contiguous(), name, " has shape ", steps.sizes(),
                    " and strides ", steps.strides(), "; expected contiguous step counts");
  TORCH_CHECK_VALUE(steps.device() == device, name, " is on ", steps.device(),
                    " but the op runs on ", device);
  state_dtype_of(steps, name);
}

void check_number(const at::Tensor& tensor, const char* name, const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.numel() == 1, name, " has ", tensor.numel(), " elements, not one");
  TORCH_CHECK_VALUE(tensor.device() == device, name, " is on ", tensor.device(),
                    " but the op runs on ", device);
  state_dtype_of(tensor, name);
}

double* control_data(const std::optional<at::Tensor>& control) {
  if (!control) return nullptr;
  check_flat(*control, "control", kControlSize, at::kDouble);
  return control->data_ptr<double>();
}

at::ScalarType state_dtype_of(const at::Tensor& tensor, const char* name) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, name, " has dtype ", dtype,
                   "; expected float32 or float64");
  return dtype;
}

at::ScalarType arithmetic_of(const at::Tensor& moment, const char* name) {
  const at::ScalarType dtype = moment.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16, name,
                   " has dtype ", dtype, "; expected float32, float64 or bfloat16");
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

LbfgsScalars lbfgs_scalars(const at::Tensor& scalars, std::int64_t slots, Reader reader) {
  TORCH_CHECK_VALUE(slots >= 2, "slots=", slots, " must be at least 2");
  check_flat(scalars, "scalars", scalar_offset(kScalarArrays, slots), at::kDouble);
  double* data = scalars.data_ptr<double>();
  if (reader == Reader::kernels) return {data, slots};
  // Compared as doubles: a NaN from a damaged checkpoint must not become an index.
  const double limit = static_cast<double>(slots);
  TORCH_CHECK_VALUE(
      data[kOpen] >= 0 && data[kOpen] < limit && data[kCount] >= 0 && data[kCount] < limit,
      "scalars say slot ", data[kOpen], " is open and ", data[kCount], " pairs are held, with ",
      slots, " slots");
  return {data, slots};
}

BroydenScalars broyden_scalars(const at::Tensor& broyden, std::int64_t slots, at::Device device) {
  check_flat(broyden, "broyden", broyden_offset(kBroydenArrays, slots), at::kDouble);
  TORCH_CHECK_VALUE(broyden.device() == device, "broyden is on ", broyden.device(),
                    " but scalars are on ", device);
  return {broyden.data_ptr<double>(), slots};
}

History::History(const at::Tensor& history, const std::optional<at::Tensor>& scales,
                 const at::Tensor& scalars, Reader reader)
    : data_(nullptr),
      scales_(nullptr),
      numel_(0),
      slot_bytes_(0),
      side_bytes_(0),
      slot_scales_(0),
      side_scales_(0),
      reader_(reader),
      row_dtype_(DType::i8),
      scalars_{nullptr, 0} {
  if (history.scalar_type() != at::kChar) {
    const std::optional<DType> dtype = known_dtype(history);
    TORCH_CHECK_TYPE(dtype, "history has dtype ", history.scalar_type(),
                     "; supported are float32, float64, bfloat16, float16 and int8");
    row_dtype_ = *dtype;
  }
  TORCH_CHECK_VALUE(history.dim() == 3 && history.size(0) == 2 && history.size(1) >= 2 &&
                        (history.stride(2) == 1 || history.size(2) <= 1),
                    "history has shape ", history.sizes(), " and strides ", history.strides(),
                    "; expected [2, slots, numel] with contiguous rows and at least 2 slots");
  data_ = static_cast<char*>(history.data_ptr());
  numel_ = history.size(2);
  side_bytes_ = history.stride(0) * static_cast<std::int64_t>(history.element_size());
  slot_bytes_ = history.stride(1) * static_cast<std::int64_t>(history.element_size());
  TORCH_CHECK_VALUE(scales.has_value() == (row_dtype_ == DType::i8),
                    "history_scale belongs to an int8 history, and only to it; "
                    "history has dtype ",
                    history.scalar_type());
  if (scales) {
    const std::int64_t blocks = (numel_ + kScaleBlock - 1) / kScaleBlock;
    TORCH_CHECK_VALUE(
        scales->sizes() == at::IntArrayRef({2, history.size(1), blocks}) && scales->is_contiguous(),
        "history_scale has shape ", scales->sizes(), "; expected a contiguous [2, ",
        history.size(1), ", ", blocks, "]");
    TORCH_CHECK_TYPE(scales->scalar_type() == at::kFloat, "history_scale has dtype ",
                     scales->scalar_type(), "; expected float32");
    scales_ = scales->data_ptr<float>();
    slot_scales_ = blocks;
    side_scales_ = history.size(1) * blocks;
  }
  scalars_ = lbfgs_scalars(scalars, history.size(1), reader);
}

PreviousGradient::PreviousGradient(const History& ring, const std::optional<at::Tensor>& grad_prev,
                                   bool apart) {
  TORCH_CHECK_VALUE(
      grad_prev || !apart,
      "grad_prev is missing: with control it must outlive a gradient that is refused");
  if (grad_prev) {
    dtype = state_dtype_of(*grad_prev, "grad_prev");
    check_flat(*grad_prev, "grad_prev", ring.numel(), dtype);
    data = grad_prev->data_ptr();
    return;
  }
  TORCH_CHECK_TYPE(ring.row_dtype() == DType::f32 || ring.row_dtype() == DType::f64,
                   "grad_prev is missing: only a float32 or float64 history can hold it");
  dtype = ring.row_dtype() == DType::f64 ? at::kDouble : at::kFloat;
  data = ring.reader() == Reader::host ? ring.y_row(ring.scalars().open()).data : nullptr;
}

DenseArguments::DenseArguments(const at::Tensor& grad, const at::Tensor& grad_prev,
                               const at::Tensor& direction, const at::Tensor& matrix,
                               const at::Tensor& vectors, const at::Tensor& matrix_scalars,
                               const at::Tensor& scalars, const std::optional<at::Tensor>& lr_scale,
                               Reader reader) {
  dtype = state_dtype_of(grad, "grad");
  numel = grad.numel();
  check_flat(grad, "grad", numel, dtype);
  check_flat(grad_prev, "grad_prev", numel, dtype);
  check_flat(direction, "direction", numel, dtype);
  if (lr_scale) check_flat(*lr_scale, "lr_scale", numel, dtype);
  check_flat(matrix, "matrix", matrix_size(numel), at::kDouble);
  TORCH_CHECK_VALUE(vectors.dim() == 2 && vectors.size(0) >= 3 && vectors.size(0) % 2 == 1 &&
                        vectors.size(1) >= tile_rows(numel) * kTile && vectors.is_contiguous(),
                    "vectors has shape ", vectors.sizes(), " and strides ", vectors.strides(),
                    "; expected a contiguous [2 terms + 1, at least ", tile_rows(numel) * kTile,
                    "]");
  TORCH_CHECK_TYPE(vectors.scalar_type() == at::kDouble, "vectors has dtype ",
                   vectors.scalar_type(), "; expected ", at::kDouble);
  stride = vectors.size(1);
  most_terms = fuse_ext::most_terms(vectors.size(0));
  TORCH_CHECK_VALUE(most_terms <= kMostTerms, "vectors has room for ", most_terms,
                    " terms; at most ", kMostTerms, " are supported");
  check_flat(matrix_scalars, "matrix_scalars", kMatrixHeader + kTermSize * most_terms, at::kDouble);
  head = lbfgs_scalars(scalars, 2, reader).data;
  const auto check_device = [&](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_VALUE(tensor.device() == grad.device(), name, " is on ", tensor.device(),
                      " but grad is on ", grad.device());
  };
  check_device(grad_prev, "grad_prev"), check_device(direction, "direction");
  check_device(matrix, "matrix"), check_device(vectors, "vectors");
  check_device(matrix_scalars, "matrix_scalars"), check_device(scalars, "scalars");
  if (lr_scale) check_device(*lr_scale, "lr_scale");
  this->matrix = matrix.data_ptr<double>();
  this->vectors = vectors.data_ptr<double>();
  numbers = matrix_scalars.data_ptr<double>();
  if (reader == Reader::kernels) return;
  const double limit = static_cast<double>(most_terms);
  TORCH_CHECK_VALUE(numbers[kTerms] >= 0 && numbers[kTerms] < limit, "matrix_scalars say that ",
                    numbers[kTerms], " terms are held, with room for ", most_terms);
}

}  // namespace fuse_ext
