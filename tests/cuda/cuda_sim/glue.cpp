// The product's own torch glue (checks, segment tables, op registration), with the CUDA device
// replaced by the execution model: torch.ops.fuse_ext_sim runs the CUDA kernels on CPU tensors.
#include "adapters.cpp"
#include "cuda/ops.cpp"
#include "scheduler.h"

namespace fuse_ext {
namespace cuda {
namespace {

// Of the op under way; new ones for every op, so that nothing is left over and AddressSanitizer
// sees their ends.
std::unique_ptr<Segment[]> table_memory;
std::unique_ptr<double[]> partials_memory;
std::unique_ptr<unsigned[]> counter_memory;

}  // namespace

DeviceCall::DeviceCall(const at::Device& device)
    : guard_(device), device_(device), stream_(nullptr) {
  counter_memory = std::make_unique<unsigned[]>(kCounters);
}

Segments DeviceCall::segments(const TensorSegments& tensors) const {
  SegmentTable table = tensors.table();
  table_memory = std::make_unique<Segment[]>(static_cast<std::size_t>(table.count));
  std::copy_n(table.segments, table.count, table_memory.get());
  table.segments = table_memory.get();
  return {table, tensors.begin(), tensors.end()};
}

Workspace DeviceCall::workspace(std::int64_t doubles) const {
  const auto size = static_cast<std::size_t>(doubles);
  partials_memory = std::make_unique<double[]>(size);
  std::fill_n(partials_memory.get(), size, std::numeric_limits<double>::quiet_NaN());
  return {partials_memory.get(), counter_memory.get()};
}

bool DeviceCall::is_capturing() const { return false; }

void DeviceCall::check_launch() const {
  for (std::int64_t i = 0; i < kCounters; ++i) {
    TORCH_CHECK(counter_memory[i] == 0, "a kernel left its workspace's counter ", i, " at ",
                counter_memory[i]);
  }
}

}  // namespace cuda

TORCH_LIBRARY_IMPL(fuse_ext_sim, CPU, m) { cuda::register_ops(m); }
TORCH_LIBRARY_IMPL(fuse_ext_sim, SparseCPU, m) { cuda::register_ops(m); }
TORCH_LIBRARY_IMPL(fuse_ext_sim, SparseCsrCPU, m) { cuda::register_ops(m); }

}  // namespace fuse_ext

extern "C" {
__attribute__((visibility("default"))) void cuda_sim_set_schedule(int order, unsigned seed) {
  cuda_sim::set_schedule(static_cast<cuda_sim::Order>(order), seed);
}
__attribute__((visibility("default"))) std::int64_t cuda_sim_launch_count() {
  return cuda_sim::launch_count();
}
__attribute__((visibility("default"))) std::int64_t cuda_sim_bytes_moved() {
  return cuda_sim::bytes_moved();
}
}
