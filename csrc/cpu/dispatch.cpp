// Chooses the instruction-set level of the CPU kernels, once, at first use.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace fuse_ext {
namespace {

// Levels that this CPU can run, best last.
std::vector<const CpuKernels*> runnable_levels() {
  std::vector<const CpuKernels*> levels = {&kernels_default};
#if defined(FUSE_EXT_X86_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    levels.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd")) {
      levels.push_back(&kernels_avx512);
    }
  }
#endif
  return levels;
}

const CpuKernels& choose() {
  const std::vector<const CpuKernels*> levels = runnable_levels();
  const char* wanted = std::getenv("FUSE_EXT_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return *levels.back();
  std::string known;
  for (const CpuKernels* level : levels) {
    if (level->level == std::string(wanted)) return *level;
    known += std::string(known.empty() ? "" : ", ") + level->level;
  }
  throw std::runtime_error("FUSE_EXT_CPU_LEVEL=" + std::string(wanted) +
                           " is not available here; this CPU runs: " + known);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

}  // namespace fuse_ext
