// The CUDA launchers as plain C++: raw device pointers, sizes, the stream as void*.
//
// Neither torch's headers nor CUDA's are needed to include this, so that the kernels compile
// without the former and their callers without the latter. Every launcher puts one kernel on the
// stream (launch_dense_direction: four) and returns at once; the caller checks for launch errors.
#pragma once

#include "../adam.h"
#include "../broyden.h"
#include "../broyden_pairs.h"
#include "../fixed_step.h"
#include "../row.h"
#include "../segments.h"
#include "../stats.h"

namespace fuse_ext::cuda {

// Where blocks leave their partial sums for the last one of them to add up. A launch on one stream
// may use it again as soon as the one before has ended: the counters are zero then.
struct Workspace {
  double* partials;    // as many doubles as the functions below say
  unsigned* counters;  // kCounters zeros
};
constexpr std::int64_t kCounters = 4096;

// Doubles that a kernel with `width` <= kGradStats sums needs, whatever the length of the vectors.
std::int64_t workspace_size(std::int64_t width);

// The same of the passes over the history.
std::int64_t update_workspace_size(DType dtype, DType row_dtype, std::int64_t slots,
                                   std::int64_t numel);
std::int64_t direction_workspace_size(DType dtype, DType row_dtype, std::int64_t slots,
                                      std::int64_t numel);

// Most slots for which the sums of one warp fit into its block's shared memory.
std::int64_t most_slots();

// A table in device memory, and the part of the flat vector that it covers.
struct Segments {
  SegmentTable table;
  std::int64_t begin, end;
};

// The ring of curvature pairs in device memory. Only the kernels read its scalars.
struct Ring {
  char* data;     // S rows, then Y rows
  float* scales;  // of 8-bit rows, one per kScaleBlock elements; else null
  std::int64_t side_bytes, slot_bytes, side_scales, slot_scales, numel;
  DType row_dtype;
  LbfgsScalars scalars;
};

// A number in device memory.
struct Number {
  const void* data;  // null: not given
  DType dtype;
};

struct AdamState {
  DType dtype;  // of the moments; for those in bf16 the arithmetic is float
  void *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // max_exp_avg_sq may be null: no amsgrad
  double* sum_sq;                               // sum of squared gradients
  Number grad_scale, found_inf;                 // GradScaler's
  Number step, lr;                              // if given, instead of the options'
  std::int64_t steps;                           // equal step counts from `step` on, all advanced
  Number loss, grad_square;                     // must be finite, if given
  double* counts;                               // steps taken and skipped; may be null
};

// Eq. 2. Does nothing but count where found_inf is not zero or the loss or grad_square is not
// finite.
void launch_adam(const Segments& segments, const AdamState& state, const AdamOptions& options,
                 Workspace workspace, void* stream);

// kGradStats doubles; without a direction `ring` is null.
void launch_grad_stats(const Segments& segments, DType dtype, bool maximize, const Ring* ring,
                       double* stats, Workspace workspace, void* stream);

// `control` of the passes (fixed_step.h) may be null; if not, it says what the host otherwise does.

// Pass 1 of L-BFGS. grad_prev may be null: the open slot's Y row.
void launch_lbfgs_update(const Segments& segments, DType dtype, bool maximize, const Ring& ring,
                         const void* grad_prev, bool form_pair, double* control,
                         Workspace workspace, void* stream);

// With broyden.data the recursion of broyden_pairs.h.
void launch_lbfgs_two_loop(LbfgsScalars scalars, BroydenScalars broyden, bool commit,
                           double step_length, double curvature_tol, bool scaled, void* stream);

// told.lr counts in units of lr_unit of `lr`, and told.loss is `loss`, where they are given.
void launch_lbfgs_decide(LbfgsScalars scalars, double* control, const FixedStep& told, Number lr,
                         double lr_unit, Number loss, void* stream);

// Pass 2 of L-BFGS. `scaled`: whether any segment's lr_scale differs from 1.
void launch_lbfgs_direction(const Segments& segments, DType dtype, bool maximize, bool scaled,
                            const Ring& ring, void* grad_prev, const double* control,
                            Workspace workspace, void* stream);

void launch_lbfgs_move(const Segments& segments, DType dtype, void* origin, const Ring& ring,
                       double step, bool save, double* control, void* stream);

void launch_fuse_blend(const Segments& segments, DType dtype, const void* origin, const Ring& ring,
                       double theta, double step, Workspace workspace, void* stream);

// What dense_direction works on (broyden.h), in device memory. Only the kernels read its numbers.
struct Dense {
  DType dtype;                  // of the first four
  const void *grad, *lr_scale;  // lr_scale may be null
  void *grad_prev, *direction;
  double *matrix, *vectors, *numbers, *head;
  std::int64_t numel, stride, most_terms;
};

// A pair s = step direction, y = grad - grad_prev.
struct DensePair {
  bool offered;
  double step, curvature_tol;
};

// Doubles of `memory` below.
std::int64_t dense_memory_size(std::int64_t numel, bool offers_pair);

// `memory` is scratch; the workspace is for three sums.
void launch_dense_direction(const Dense& of, const DensePair& pair, const Formula& formula,
                            double* memory, Workspace workspace, void* stream);

void launch_grad_gather(const Segments& segments, DType dtype, void* flat, void* stream);
void launch_grad_scatter(const Segments& segments, DType dtype, const void* flat, void* stream);

}  // namespace fuse_ext::cuda
