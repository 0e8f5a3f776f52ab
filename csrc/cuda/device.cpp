// Streams, segment tables and workspaces on CUDA devices.
//
// Device memory comes from torch's caching allocator, for the stream that uses it: what is dropped
// here may still be read by kernels under way, and is handed out again in stream order only.
#include "device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <tuple>

#include "kept.h"

namespace fuse_ext::cuda {
namespace {

at::Tensor device_bytes(std::size_t bytes, const at::Device& device) {
  return at::empty({static_cast<std::int64_t>(bytes)}, at::TensorOptions(at::kByte).device(device));
}

// Stream order, and which graph is being captured on the stream, if any.
struct Place {
  c10::DeviceIndex device;
  cudaStream_t stream;
  unsigned long long capture;  // 0: none

  bool operator==(const Place&) const = default;
  bool operator<(const Place& other) const {
    return std::tie(device, stream, capture) < std::tie(other.device, other.stream, other.capture);
  }
};

Place place_of(const at::Device& device, void* stream) {
  Place place{device.index(), static_cast<cudaStream_t>(stream), 0};
  cudaStreamCaptureStatus status{};
  unsigned long long capture = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(place.stream, &status, &capture));
  if (status == cudaStreamCaptureStatusActive) place.capture = capture;
  return place;
}

std::size_t size_of_table(const SegmentTable& host) {
  return static_cast<std::size_t>(host.count) * sizeof(Segment);
}

// In stream order, from pinned memory, which torch keeps until the copy has been made.
at::Tensor upload_in_order(const SegmentTable& host, const at::Device& device) {
  const std::size_t size = size_of_table(host);
  const at::Tensor pinned = at::empty({static_cast<std::int64_t>(size)},
                                      at::TensorOptions(at::kByte).pinned_memory(true));
  std::memcpy(pinned.data_ptr(), host.segments, size);
  at::Tensor bytes = device_bytes(size, device);
  bytes.copy_(pinned, /*non_blocking=*/true);
  return bytes;
}

// While a graph is being captured: on a stream outside of the capture, and waited for, so that
// the graph neither repeats the upload nor needs the host's copy again.
at::Tensor upload_at_once(const SegmentTable& host, const at::Device& device) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  c10::cuda::CUDAStream side = c10::cuda::getStreamFromPool(false, device.index());
  while (c10::cuda::isStreamCapturingMayInitCtx(side)) {
    side = c10::cuda::getStreamFromPool(false, device.index());
  }
  const c10::StreamGuard guard(side.unwrap());
  const std::size_t size = size_of_table(host);
  at::Tensor bytes = device_bytes(size, device);
  C10_CUDA_CHECK(
      cudaMemcpyAsync(bytes.data_ptr(), host.segments, size, cudaMemcpyHostToDevice, side));
  C10_CUDA_CHECK(cudaStreamSynchronize(side));
  return bytes;
}

// Of all devices. Gradients of every group of every optimizer may move between a few places, as
// with zero_grad(set_to_none=True), each of which has a table: here are 32,768 of up to 9 tensors,
// or 29 of 10,000. What is left behind by gradients that never come back is no more than that.
constexpr std::size_t kMostTableBytes = 16 << 20;
constexpr std::size_t kCounterBytes = kCounters * sizeof(unsigned);

// Never destroyed: at exit the CUDA driver may be gone before static objects are.
SegmentTables<Place, at::Tensor>& tables() {
  static auto& tables = *new SegmentTables<Place, at::Tensor>(kMostTableBytes);
  return tables;
}
Workspaces<Place, at::Tensor>& workspaces() {
  static auto& workspaces = *new Workspaces<Place, at::Tensor>;
  return workspaces;
}

}  // namespace

DeviceCall::DeviceCall(const at::Device& device)
    : guard_(device),
      device_(guard_.current_device()),
      stream_(c10::cuda::getCurrentCUDAStream(device_.index()).stream()) {}

Segments DeviceCall::segments(const TensorSegments& tensors) const {
  SegmentTable table = tensors.table();
  if (table.count > 0) {
    const Place place = place_of(device_, stream_);
    const bool lasting = place.capture != 0;
    const auto upload = [&] {
      return lasting ? upload_at_once(table, device_) : upload_in_order(table, device_);
    };
    held_.push_back(tables().find(table, place, lasting, upload));
    table.segments = static_cast<const Segment*>(held_.back().const_data_ptr());
  }
  return {table, tensors.begin(), tensors.end()};
}

Workspace DeviceCall::workspace(std::int64_t doubles) const {
  const Place place = place_of(device_, stream_);
  const std::size_t size = kCounterBytes + static_cast<std::size_t>(doubles) * sizeof(double);
  held_.push_back(workspaces().find(size, place, [&] {
    at::Tensor bytes = device_bytes(size, device_);
    C10_CUDA_CHECK(cudaMemsetAsync(bytes.data_ptr(), 0, kCounterBytes, place.stream));
    return bytes;
  }));
  char* const base = static_cast<char*>(held_.back().data_ptr());
  return {reinterpret_cast<double*>(base + kCounterBytes), reinterpret_cast<unsigned*>(base)};
}

bool DeviceCall::is_capturing() const { return place_of(device_, stream_).capture != 0; }

void DeviceCall::check_launch() const { C10_CUDA_KERNEL_LAUNCH_CHECK(); }

}  // namespace fuse_ext::cuda
