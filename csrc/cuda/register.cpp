// Makes the CUDA kernels those of torch.ops.fuse_ext on CUDA tensors.
#include "device.h"

namespace fuse_ext {

TORCH_LIBRARY_IMPL(fuse_ext, CUDA, m) { cuda::register_ops(m); }
// Also for sparse tensors: the check in adapters.cpp says more than the dispatcher's refusal.
TORCH_LIBRARY_IMPL(fuse_ext, SparseCUDA, m) { cuda::register_ops(m); }
TORCH_LIBRARY_IMPL(fuse_ext, SparseCsrCUDA, m) { cuda::register_ops(m); }

}  // namespace fuse_ext
