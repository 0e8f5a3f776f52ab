// Streams, segment tables and workspaces on CUDA devices.
//
// Device memory comes from torch's caching allocator, for the stream that uses it: what is dropped
// here may still be read by kernels under way, and is handed out again in stream order only.
#include "device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <list>
#include <map>
#include <mutex>

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

// Segment tables in device memory, most recently used first.
class Tables {
 public:
  const Segment* find(const SegmentTable& host, const Place& place, const at::Device& device) {
    const std::lock_guard lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (!entry->serves(place) || !entry->holds(host)) continue;
      entries_.splice(entries_.begin(), entries_, entry);
      return entry->on_device();
    }
    if (place.capture == 0) drop_oldest();
    const bool lasting = place.capture != 0;
    at::Tensor bytes = lasting ? upload_at_once(host, device) : upload_in_order(host, device);
    entries_.push_front(
        {place, lasting, {host.segments, host.segments + host.count}, std::move(bytes)});
    return entries_.front().on_device();
  }

 private:
  // Gradients that move between a few places, as with zero_grad(set_to_none=True), and several
  // optimizers; a table takes 56 bytes a tensor.
  static constexpr std::size_t kRecent = 32;

  struct Entry {
    Place place;
    bool lasting;  // complete, and never dropped: a captured graph may read it at any time
    std::vector<Segment> host;
    at::Tensor bytes;

    bool serves(const Place& other) const {
      return lasting ? place.device == other.device : place == other;
    }
    bool holds(const SegmentTable& table) const {
      return host.size() == static_cast<std::size_t>(table.count) &&
             std::equal(host.begin(), host.end(), table.segments);
    }
    const Segment* on_device() const { return static_cast<const Segment*>(bytes.const_data_ptr()); }
  };

  static std::size_t size_of_table(const SegmentTable& host) {
    return static_cast<std::size_t>(host.count) * sizeof(Segment);
  }

  // In stream order, from pinned memory, which torch keeps until the copy has been made.
  static at::Tensor upload_in_order(const SegmentTable& host, const at::Device& device) {
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
  static at::Tensor upload_at_once(const SegmentTable& host, const at::Device& device) {
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

  void drop_oldest() {
    const auto recent = std::count_if(entries_.begin(), entries_.end(),
                                      [](const Entry& entry) { return !entry.lasting; });
    if (static_cast<std::size_t>(recent) < kRecent) return;
    const auto oldest = std::find_if(entries_.rbegin(), entries_.rend(),
                                     [](const Entry& entry) { return !entry.lasting; });
    entries_.erase(std::next(oldest).base());
  }

  std::mutex mutex_;
  std::list<Entry> entries_;
};

// One workspace per stream, as launches on one stream follow each other; within a graph being
// captured one that belongs to the graph.
class Workspaces {
 public:
  Workspace find(std::int64_t doubles, const Place& place, const at::Device& device) {
    const std::lock_guard lock(mutex_);
    drop_finished_captures(place);
    at::Tensor& bytes = entries_[place];
    const std::size_t size = kCounterBytes + static_cast<std::size_t>(doubles) * sizeof(double);
    if (!bytes.defined() || static_cast<std::size_t>(bytes.numel()) < size) {
      bytes = device_bytes(size, device);
      C10_CUDA_CHECK(cudaMemsetAsync(bytes.data_ptr(), 0, kCounterBytes, place.stream));
    }
    char* const base = static_cast<char*>(bytes.data_ptr());
    return {reinterpret_cast<double*>(base + kCounterBytes), reinterpret_cast<unsigned*>(base)};
  }

 private:
  static constexpr std::size_t kCounterBytes = kCounters * sizeof(unsigned);

  // A graph keeps its memory pool itself, so what was captured stays valid.
  void drop_finished_captures(const Place& now) {
    std::erase_if(entries_, [&](const auto& entry) {
      return entry.first.capture != 0 && entry.first.device == now.device &&
             entry.first.stream == now.stream && entry.first.capture != now.capture;
    });
  }

  std::mutex mutex_;
  std::map<Place, at::Tensor> entries_;
};

// Never destroyed: at exit the CUDA driver may be gone before static objects are.
Tables& tables() {
  static Tables& tables = *new Tables;
  return tables;
}
Workspaces& workspaces() {
  static Workspaces& workspaces = *new Workspaces;
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
    table.segments = tables().find(table, place_of(device_, stream_), device_);
  }
  return {table, tensors.begin(), tensors.end()};
}

Workspace DeviceCall::workspace(std::int64_t doubles) const {
  return workspaces().find(doubles, place_of(device_, stream_), device_);
}

bool DeviceCall::is_capturing() const { return place_of(device_, stream_).capture != 0; }

void DeviceCall::check_launch() const { C10_CUDA_KERNEL_LAUNCH_CHECK(); }

}  // namespace fuse_ext::cuda
