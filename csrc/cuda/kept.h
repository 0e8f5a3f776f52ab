// What is kept in device memory between launches: segment tables and workspaces. Without CUDA and
// torch (`Memory` is a tensor, or what the tests put in its place), so that the tests run it.
//
// Ops release the GIL, so several threads may call. What is found is handed out as memory that its
// holder owns too: to be held until the launch that reads it is in its stream. What is given back
// after that is handed out again in stream order only.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../segments.h"

namespace fuse_ext::cuda {

// Segment tables, the least recently used given back first. A Place is a stream of a device, or a
// graph that is being captured there.
template <class Place, class Memory>
class SegmentTables {
 public:
  // `most_bytes` of device memory, but for those of graphs; the newest table is kept in any case.
  explicit SegmentTables(std::size_t most_bytes) : most_bytes_(most_bytes) {}

  // The table in device memory; upload() makes it where none is equal. `lasting`: for a captured
  // graph, which may read it at any time, so it is never dropped, and serves all of the device.
  template <class Upload>
  Memory find(const SegmentTable& host, const Place& place, bool lasting, Upload&& upload) {
    const std::lock_guard lock(mutex_);
    const std::size_t hash = hash_of(host);
    const auto [begin, end] = by_hash_.equal_range(hash);
    for (auto found = begin; found != end; ++found) {
      const auto entry = found->second;
      if (!entry->serves(place) || !entry->holds(host)) continue;
      entries_.splice(entries_.begin(), entries_, entry);
      return entry->memory;
    }
    entries_.push_front(
        {place, lasting, hash, {host.segments, host.segments + host.count}, upload()});
    by_hash_.emplace(hash, entries_.begin());
    if (!lasting) {
      bytes_ += entries_.front().bytes();
      drop_oldest();
    }
    return entries_.front().memory;
  }

 private:
  // What torch's allocator gives at least.
  static constexpr std::size_t kLeastBytes = 512;

  struct Entry {
    Place place;
    bool lasting;
    std::size_t hash;
    std::vector<Segment> host;
    Memory memory;

    bool serves(const Place& other) const {
      return lasting ? place.device == other.device : place == other;
    }
    bool holds(const SegmentTable& table) const {
      return host.size() == static_cast<std::size_t>(table.count) &&
             std::equal(host.begin(), host.end(), table.segments);
    }
    std::size_t bytes() const { return std::max(host.size() * sizeof(Segment), kLeastBytes); }
  };
  using Entries = std::list<Entry>;

  // Of what differs between tables: parameters and their options, and gradients that have moved.
  static std::size_t hash_of(const SegmentTable& table) {
    std::uint64_t hash = static_cast<std::uint64_t>(table.count);
    const auto mix = [&](std::uint64_t bits) {
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    };
    for (std::int64_t i = 0; i < table.count; ++i) {
      const Segment& segment = table.segments[i];
      mix(reinterpret_cast<std::uintptr_t>(segment.param));
      mix(reinterpret_cast<std::uintptr_t>(segment.grad));
      mix(std::bit_cast<std::uint64_t>(segment.weight_decay));
      mix(std::bit_cast<std::uint64_t>(segment.lr_scale));
    }
    return static_cast<std::size_t>(hash);
  }

  void drop_oldest() {
    for (auto entry = entries_.end(); bytes_ > most_bytes_ && entry != entries_.begin();) {
      --entry;
      if (entry->lasting || entry == entries_.begin()) continue;
      bytes_ -= entry->bytes();
      const auto [begin, end] = by_hash_.equal_range(entry->hash);
      by_hash_.erase(std::find_if(begin, end, [&](const auto& at) { return at.second == entry; }));
      entry = entries_.erase(entry);
    }
  }

  std::size_t most_bytes_, bytes_ = 0;
  std::mutex mutex_;
  Entries entries_;  // most recently used first
  std::unordered_multimap<std::size_t, typename Entries::iterator> by_hash_;
};

// One workspace per stream, as launches on one stream follow each other; within a graph being
// captured one that belongs to the graph.
template <class Place, class Memory>
class Workspaces {
 public:
  // The place's, of at least `bytes`; make() makes a new one where it is shorter.
  template <class Make>
  Memory find(std::size_t bytes, const Place& place, Make&& make) {
    const std::lock_guard lock(mutex_);
    drop_finished_captures(place);
    auto& [size, memory] = entries_[place];
    if (size < bytes) {
      memory = make();
      size = bytes;
    }
    return memory;
  }

 private:
  // A graph keeps its memory pool itself, so what was captured stays valid.
  void drop_finished_captures(const Place& now) {
    std::erase_if(entries_, [&](const auto& entry) {
      return entry.first.capture != 0 && entry.first.device == now.device &&
             entry.first.stream == now.stream && entry.first.capture != now.capture;
    });
  }

  std::mutex mutex_;
  std::map<Place, std::pair<std::size_t, Memory>> entries_;
};

}  // namespace fuse_ext::cuda
