// The same kernels for x86-64-v4. Empty on other architectures.
#include "kernels.h"

#if defined(FUSE_EXT_X86_LEVELS)
#include <immintrin.h>

// After kernels.h and the system headers, so that no shared inline function is compiled for
// instructions that the running CPU may lack.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif

#define FUSE_CPU_KERNELS kernels_avx512
#define FUSE_CPU_LEVEL "avx512"
#define FUSE_CPU_FMA 1
#define FUSE_CPU_LANE_BYTES 64
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
