// What an op needs of the device that its tensors are on. The tests implement this on the CPU
// (tests/cuda/cuda_sim), so that ops.cpp runs there as it is.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "../adapters.h"
#include "launch.h"

namespace fuse_ext::cuda {

// One op call. Makes the device current for its lifetime, and holds what its launch reads: another
// thread may put a larger workspace, or another table, in the place of either at any time.
class DeviceCall {
 public:
  explicit DeviceCall(const at::Device& device);

  // The device's current stream.
  void* stream() const { return stream_; }

  // The segment table in device memory. Uploaded only when it differs from every recent one.
  Segments segments(const TensorSegments& tensors) const;

  // Memory for the sums of one launch, of the current stream.
  Workspace workspace(std::int64_t doubles) const;

  // Whether what is launched now becomes part of a graph instead.
  bool is_capturing() const;

  // Raises RuntimeError where the launch just made was refused.
  void check_launch() const;

 private:
  c10::DeviceGuard guard_;
  at::Device device_;
  void* stream_;
  mutable std::vector<at::Tensor> held_;
};

// Adds the kernels of every op to a library.
void register_ops(torch::Library& m);

}  // namespace fuse_ext::cuda
