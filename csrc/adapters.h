// From tensors to raw pointers: argument checks, the segment table, the history's rows. Every check
// that an op makes lives here and names the argument.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "broyden.h"
#include "broyden_pairs.h"
#include "fixed_step.h"
#include "row.h"
#include "segments.h"

namespace fuse_ext {

// The segment table of one op call. Tensors that are not dense, and gradients whose memory order
// differs from their parameter's, are worked on in a dense copy; *_changed() writes the copies back
// and bumps version counters, as every in-place op must.
class TensorSegments {
 public:
  struct Options {
    at::ArrayRef<double> weight_decay;  // per tensor; empty: none
    at::ArrayRef<double> lr_scale;      // per tensor; empty: 1
    bool writes_grads = false;
  };

  // Flat indices lie in [0, numel). `state` is the dtype of the flat vectors and of the arithmetic:
  // float64 where a parameter has it, lest the parameter lose digits.
  TensorSegments(at::TensorList params, at::TensorList grads, at::IntArrayRef offsets,
                 std::int64_t numel, at::ScalarType state, const Options& options)
      : TensorSegments(params, &grads, offsets, numel, state, options) {}
  // For ops that only move parameters.
  TensorSegments(at::TensorList params, at::IntArrayRef offsets, std::int64_t numel,
                 at::ScalarType state)
      : TensorSegments(params, nullptr, offsets, numel, state, Options{}) {}

  SegmentTable table() const {
    return {segments_.data(), static_cast<std::int64_t>(segments_.size())};
  }
  // First and one past the last flat index that a segment covers.
  std::int64_t begin() const { return segments_.empty() ? 0 : segments_.front().offset; }
  std::int64_t end() const {
    return segments_.empty() ? 0 : segments_.back().offset + segments_.back().numel;
  }

  void params_changed() { write_back(params_); }
  void grads_changed() { write_back(grads_); }

 private:
  struct Copy {
    std::size_t index;
    at::Tensor dense;
  };
  struct Side {
    at::TensorList tensors;
    std::vector<Copy> copies;
  };
  TensorSegments(at::TensorList params, const at::TensorList* grads, at::IntArrayRef offsets,
                 std::int64_t numel, at::ScalarType state, const Options& options);
  static void write_back(Side& side);

  std::vector<Segment> segments_;
  Side params_, grads_;
};

// Checks that a flat state tensor is what the kernels expect.
void check_flat(const at::Tensor& tensor, const char* name, std::int64_t numel,
                at::ScalarType dtype);

// Checks that a tensor is a contiguous vector of float32 or float64 on a device: the step counts of
// parameters that have taken as many steps, which an op reads and advances.
void check_steps(const at::Tensor& steps, const char* name, const at::Device& device);

// Checks that a tensor is one number of float32 or float64 on a device, which an op reads, and
// perhaps writes, where it lies.
void check_number(const at::Tensor& tensor, const char* name, const at::Device& device);

// The numbers of a fixed step (fixed_step.h); null where there is no such tensor.
double* control_data(const std::optional<at::Tensor>& control);

// The dtype of a state tensor, which must be float32 or float64.
at::ScalarType state_dtype_of(const at::Tensor& tensor, const char* name);

// The dtype of the arithmetic on Adam's moments: their own, or float32 for those in bfloat16.
at::ScalarType arithmetic_of(const at::Tensor& moment, const char* name);

// Who reads the scalars of an L-BFGS ring: the host, or only kernels on the device where they lie,
// so that no op waits for it.
enum class Reader { host, kernels };

// The scalars of an L-BFGS ring. For the host they are checked: whatever they hold, no slot lies
// outside of the ring. Kernels see to that themselves.
LbfgsScalars lbfgs_scalars(const at::Tensor& scalars, std::int64_t slots,
                           Reader reader = Reader::host);

// What lies beside them with the Broyden update (broyden_pairs.h); indices in it are not trusted.
BroydenScalars broyden_scalars(const at::Tensor& broyden, std::int64_t slots, at::Device device);

// The ring of curvature pairs: history [2, slots, numel] (S rows, then Y rows) with contiguous
// rows, and scalars as in two_loop.h. An int8 history has scales, float32 [2, slots, blocks] with
// one for every kScaleBlock elements of a row.
class History {
 public:
  History(const at::Tensor& history, const std::optional<at::Tensor>& scales,
          const at::Tensor& scalars, Reader reader = Reader::host);

  std::int64_t numel() const { return numel_; }
  DType row_dtype() const { return row_dtype_; }
  LbfgsScalars scalars() const { return scalars_; }
  Reader reader() const { return reader_; }
  std::int64_t slot_bytes() const { return slot_bytes_; }
  std::int64_t side_bytes() const { return side_bytes_; }  // from the S rows to the Y rows
  std::int64_t slot_scales() const { return slot_scales_; }
  std::int64_t side_scales() const { return side_scales_; }
  Row s_row(std::int64_t slot) const { return row(0, slot); }
  Row y_row(std::int64_t slot) const { return row(1, slot); }
  Row open_row() const { return s_row(scalars_.open()); }

 private:
  Row row(std::int64_t side, std::int64_t slot) const {
    return {data_ + side * side_bytes_ + slot * slot_bytes_,
            scales_ == nullptr ? nullptr : scales_ + side * side_scales_ + slot * slot_scales_,
            row_dtype_};
  }

  char* data_;
  float* scales_;
  std::int64_t numel_, slot_bytes_, side_bytes_, slot_scales_, side_scales_;
  Reader reader_;
  DType row_dtype_;
  LbfgsScalars scalars_;
};

// Where the previous gradient lives: in `grad_prev`, or without one in the open
// slot's Y row (then history and state have one dtype), unless it must lie apart.
// `data` is null where only kernels read which slot is open.
struct PreviousGradient {
  PreviousGradient(const History& ring, const std::optional<at::Tensor>& grad_prev,
                   bool apart = false);

  void* data;
  at::ScalarType dtype;  // the state's
};

// The dense inverse Hessian of broyden.h and what an op on it reads and writes, all flat.
struct DenseArguments {
  DenseArguments(const at::Tensor& grad, const at::Tensor& grad_prev, const at::Tensor& direction,
                 const at::Tensor& matrix, const at::Tensor& vectors,
                 const at::Tensor& matrix_scalars, const at::Tensor& scalars,
                 const std::optional<at::Tensor>& lr_scale, Reader reader = Reader::host);

  at::ScalarType dtype;  // of grad, grad_prev, direction and lr_scale
  std::int64_t numel, stride, most_terms;
  double *matrix, *vectors, *numbers;  // numbers: matrix_scalars
  double* head;                        // scalars
};

void bump_version(const at::Tensor& tensor);

}  // namespace fuse_ext
