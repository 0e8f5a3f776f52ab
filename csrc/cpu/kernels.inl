// Kernel bodies, compiled once per instruction-set level. Everything here has internal linkage,
// so that no level's code can be linked into another's.
#include "adam.inl"
#include "dense.inl"
#include "lbfgs.inl"

namespace fuse_ext {
namespace {

template <class T>
constexpr StateKernels<T> state_kernels() {
  return {adam<T>, grad_stats<T>, largest_param<T>, dots<T>,   combine<T>,
          move<T>, blend<T>,      gather<T>,        scatter<T>};
}

}  // namespace

extern const CpuKernels FUSE_CPU_KERNELS = {
    FUSE_CPU_LEVEL,
    state_kernels<float>(),
    state_kernels<double>(),
    adam_bf16,
    {matrix_product, matrix_take_in, vector_dots, vector_sum}};

}  // namespace fuse_ext
