// Between the passes over the history: the recursion, and with it what the host otherwise decides,
// on scalars alone, by one block.
#include "rows.cuh"

namespace fuse_ext::cuda {
namespace {

// The threads of a block.
struct Block {
  __device__ __forceinline__ Index rank() const { return static_cast<Index>(threadIdx.x); }
  __device__ __forceinline__ Index size() const { return kThreads; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// Calls work(scalars), which the threads of the block share, and after it every write is done.
// `staged`: the scalars are worked on in shared memory, as the recursion waits for every number
// that it reads.
template <bool staged, class Work>
__device__ __forceinline__ void on_scalars(LbfgsScalars scalars, double* shared, Work&& work) {
  const Block block;
  const Index size = scalar_offset(kScalarArrays, scalars.slots);
  LbfgsScalars state = scalars;
  if constexpr (staged) {
    for (Index i = block.rank(); i < size; i += block.size()) shared[i] = scalars.data[i];
    __syncthreads();
    state.data = shared;
  }
  if (!is_ring(state)) {
    if (block.rank() == 0) *scalars.array(kCoefG) = nan("");
    return;
  }
  work(state, block);
  if constexpr (staged) {
    __syncthreads();
    for (Index i = block.rank(); i < size; i += block.size()) scalars.data[i] = shared[i];
  }
}

template <bool staged>
__global__ void __launch_bounds__(kThreads, 1)
    two_loop_kernel(LbfgsScalars scalars, bool commit, double step_length, double curvature_tol) {
  FUSE_SHARED(double, shared);
  on_scalars<staged>(scalars, shared, [&](LbfgsScalars state, const Block& block) {
    if (commit) commit_pair(state, step_length, curvature_tol, block);
    two_loop(state, block);
  });
}

// The matrices of `of` stay where they are: only the scalars can be staged.
template <bool staged>
__global__ void __launch_bounds__(kThreads, 1)
    broyden_kernel(LbfgsScalars scalars, BroydenScalars of, bool commit, double step_length,
                   double curvature_tol, bool scaled) {
  FUSE_SHARED(double, shared);
  on_scalars<staged>(scalars, shared, [&](LbfgsScalars state, const Block& block) {
    const bool fresh = commit && commit_broyden_pair(state, of, step_length, curvature_tol, block);
    broyden_recursion(state, of, step_length, fresh, scaled, block);
  });
}

template <bool staged>
__global__ void __launch_bounds__(kThreads, 1)
    decide_kernel(LbfgsScalars scalars, double* control, FixedStep told, Number lr, double lr_unit,
                  Number loss) {
  FUSE_SHARED(double, shared);
  if (lr.data != nullptr) told.lr *= read(lr) / lr_unit;
  if (loss.data != nullptr) told.loss = read(loss);
  on_scalars<staged>(scalars, shared, [&](LbfgsScalars state, const Block& block) {
    decide_step(state, control, told, block);
  });
}

// Bytes of the scalars where shared memory holds them, else 0.
Index staged_bytes(LbfgsScalars scalars) {
  const Index bytes =
      scalar_offset(kScalarArrays, scalars.slots) * static_cast<Index>(sizeof(double));
  return bytes <= kSharedBytes ? bytes : 0;
}

}  // namespace

void launch_lbfgs_two_loop(LbfgsScalars scalars, BroydenScalars broyden, bool commit,
                           double step_length, double curvature_tol, bool scaled, void* stream) {
  const Index bytes = staged_bytes(scalars);
  if (broyden.data != nullptr && bytes > 0) {
    FUSE_LAUNCH((broyden_kernel<true>), 1, bytes, stream, scalars, broyden, commit, step_length,
                curvature_tol, scaled);
  } else if (broyden.data != nullptr) {
    FUSE_LAUNCH((broyden_kernel<false>), 1, 0, stream, scalars, broyden, commit, step_length,
                curvature_tol, scaled);
  } else if (bytes > 0) {
    FUSE_LAUNCH((two_loop_kernel<true>), 1, bytes, stream, scalars, commit, step_length,
                curvature_tol);
  } else {
    FUSE_LAUNCH((two_loop_kernel<false>), 1, 0, stream, scalars, commit, step_length,
                curvature_tol);
  }
}

void launch_lbfgs_decide(LbfgsScalars scalars, double* control, const FixedStep& told, Number lr,
                         double lr_unit, Number loss, void* stream) {
  const Index bytes = staged_bytes(scalars);
  if (bytes > 0) {
    FUSE_LAUNCH((decide_kernel<true>), 1, bytes, stream, scalars, control, told, lr, lr_unit, loss);
  } else {
    FUSE_LAUNCH((decide_kernel<false>), 1, 0, stream, scalars, control, told, lr, lr_unit, loss);
  }
}
}  // namespace fuse_ext::cuda
