// One vector of the history as kernels see it.
#pragma once

#include "numeric.h"

namespace fuse_ext {

// As long as the flat vector. `scales` only with DType::i8: one per kScaleBlock
// elements.
struct Row {
  void* data;
  float* scales;
  DType dtype;
};

// Rows of one dtype.
struct Rows {
  const Row* row;
  std::int64_t count;
};

}  // namespace fuse_ext
