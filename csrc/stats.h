// What the passes over the gradient report, in the order of the tensors that receive it.
#pragma once

namespace fuse_ext {

// Places in grad_stats' output.
enum GradStat : int {
  kGradDotDirection,
  kGradSq,
  kGradAbsSum,
  kPenalty,     // sum of weight_decay/2 x^2: what weight decay adds to the loss
  kGradAbsMax,  // a maximum; the others are sums
  kGradStats,
};

}  // namespace fuse_ext
