// The kernels for the baseline instruction set of the platform.
#include "kernels.h"

#define FUSE_CPU_KERNELS kernels_default
#define FUSE_CPU_LEVEL "default"
#include "kernels.inl"
