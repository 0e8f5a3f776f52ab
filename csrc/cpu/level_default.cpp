// The kernels for the baseline instruction set of the platform.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FUSE_CPU_KERNELS kernels_default
#define FUSE_CPU_LEVEL "default"
#include "kernels.inl"
