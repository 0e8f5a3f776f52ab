// One vector of the history as kernels see it.
#pragma once

#include "numeric.h"

namespace fuse_ext {

// Below the normal numbers a scale has lost digits, and its inverse may be infinite: blocks with a
// smaller one are stored as zeros.
constexpr float kLeastScale = 0x1p-126f;

// As long as the flat vector. `scales` only with DType::i8: one per kScaleBlock
// elements.
struct Row {
  void* data;
  float* scales;
  DType dtype;
};

// Rows of one dtype. `ahead`: how many bytes ahead of its reads a CPU kernel
// prefetches a row; 0 where the rows lie in a cache.
struct Rows {
  const Row* row;
  std::int64_t count;
  std::int64_t ahead = 0;
};

}  // namespace fuse_ext
