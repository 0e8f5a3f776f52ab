// The instruction-set levels that this CPU can run: all up to the one that was chosen.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace check {

inline constexpr fuse_ext::PastCaches kPastCaches[] = {
    fuse_ext::PastCaches::nothing, fuse_ext::PastCaches::params, fuse_ext::PastCaches::vectors};

inline std::vector<const fuse_ext::CpuKernels*> runnable_levels() {
  std::vector<const fuse_ext::CpuKernels*> levels = {&fuse_ext::kernels_default};
#if defined(FUSE_EXT_X86_LEVELS)
  for (const auto* level : {&fuse_ext::kernels_avx2, &fuse_ext::kernels_avx512}) {
    if (levels.back() != &fuse_ext::cpu_kernels()) levels.push_back(level);
  }
#endif
  return levels;
}

}  // namespace check
