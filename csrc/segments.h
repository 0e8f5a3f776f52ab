// The segment table lays the user's tensors end to end: flat offset -> (pointers, length).
// State is flat and ours; parameters and gradients stay where the user put them.
#pragma once

#include "numeric.h"

namespace fuse_ext {

struct Segment {
  void* param;          // numel elements of param_dtype, dense
  const void* grad;     // numel elements of grad_dtype in the same memory order; may be null
  std::int64_t offset;  // first flat index
  std::int64_t numel;   // elements
  double weight_decay;  // L2 coefficient that the L-BFGS passes add to the gradient
  double lr_scale;      // this segment's share of a step along the direction
  DType param_dtype;
  DType grad_dtype;

  bool operator==(const Segment&) const = default;
};

// Segments sorted by offset, without overlap. Flat indices that no segment covers belong to
// parameters without a gradient: they read as zero and are never written.
struct SegmentTable {
  const Segment* segments;
  std::int64_t count;

  // Calls visit(segment, first element inside it, first flat index, length) for every piece of
  // the table inside the flat range [begin, end).
  template <class Visit>
  FUSE_MEMBER void for_each_piece(std::int64_t begin, std::int64_t end, Visit&& visit) const {
    for (std::int64_t i = first_ending_after(begin); i < count && segments[i].offset < end; ++i) {
      const Segment& segment = segments[i];
      const std::int64_t stop = segment.offset + segment.numel;
      const std::int64_t from = segment.offset > begin ? segment.offset : begin;
      const std::int64_t to = stop < end ? stop : end;
      if (from < to) visit(segment, from - segment.offset, from, to - from);
    }
  }

  // The first segment from `low` on that ends after a flat index.
  FUSE_MEMBER std::int64_t first_ending_after(std::int64_t index, std::int64_t low = 0) const {
    std::int64_t high = count;
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      if (segments[middle].offset + segments[middle].numel > index) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

}  // namespace fuse_ext
