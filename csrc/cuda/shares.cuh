// How a pass over the history is divided over blocks and over the warps of each: by tiles of the
// vector and, where these are few, by slices of the pairs. Lengths alone decide.
#pragma once

#include "tile.cuh"

namespace fuse_ext::cuda {

// Blocks that must fit onto a multiprocessor together, which bounds the registers of a thread.
template <class T, DType row>
constexpr int kBlocksAtOnce = sizeof(T) == 4 ? 3 : 2;

// How a pass is divided: a block has tiles of the vector and, where these alone would occupy few
// multiprocessors, a slice of the pairs.
struct Shares {
  int slices;
  int columns;  // blocks of a slice
  int pairs;    // of a slice, at most
  int warps;    // of a block that take part
};

// Doubles for the three sums of lbfgs_direction, up to where vectors may begin that move as packs.
__host__ __device__ __forceinline__ Index direction_sums(int columns) {
  return ((columns + kGroups) * Index{3} + 1) / 2 * 2;
}

// Which share a block has.
struct Share {
  int slice, column;
  Index begin, end;  // ages of its pairs
  Index first_slot;  // of the newest of them

  __device__ __forceinline__ Share(const Shares& shares, const RingPosition& ring)
      : slice(static_cast<int>(blockIdx.x) / shares.columns),
        column(static_cast<int>(blockIdx.x) % shares.columns) {
    const Index length = (ring.count + shares.slices - 1) / shares.slices;
    begin = slice * length < ring.count ? slice * length : ring.count;
    end = begin + length < ring.count ? begin + length : ring.count;
    first_slot = ring.at_age(begin);
  }
};

template <class T>
struct PassArguments {
  Segments segments;
  Ring ring;
  T* grad_prev;  // may be null: the open slot's Y row
  T sign;
  bool flag;     // form_pair, or whether directions are scaled by segment
  bool aligned;  // rows and grad_prev start where whole packs may
  Shares shares;
  double* control;
  Workspace workspace;
};

// Counters of slices, kGroups + 1 each, and behind them one for each column of blocks.
constexpr int kMostSlices = 64;
static_assert(kMostSlices * (kGroups + 1) + kFill <= kCounters);
template <class T>
__device__ __forceinline__ unsigned* counter_of_column(const PassArguments<T>& a, int column) {
  return a.workspace.counters + kMostSlices * (kGroups + 1) + column;
}

// Calls add(age, S row, Y row), the rows as they are stored, for the pairs of a share.
template <class Pass, DType row, class Add>
__device__ __forceinline__ void for_each_pair(const Ring& of, const RingPosition& ring,
                                              const Share& share, Index tile, bool whole,
                                              Add&& add) {
  typename Pass::Stored s_rows[Pass::kBatch], y_rows[Pass::kBatch];
  Index slot = share.first_slot;
#pragma unroll 1
  for (Index age = share.begin; age < share.end; age += Pass::kBatch) {
#pragma unroll
    for (int b = 0; b < Pass::kBatch; ++b) {
      if (b > 0 && age + b >= share.end) break;
      s_rows[b].load(row_of(of, row, 0, slot), tile, of.numel, whole);
      y_rows[b].load(row_of(of, row, 1, slot), tile, of.numel, whole);
      slot = ring.older(slot);
    }
#pragma unroll
    for (int b = 0; b < Pass::kBatch; ++b) {
      if (b > 0 && age + b >= share.end) break;
      add(age + b, s_rows[b], y_rows[b]);
    }
  }
}

// Calls function with the arithmetic type and, as a tag, the rows' dtype.
template <class Function>
void with_types(DType state, DType row, Function&& function) {
  with_state_type(state, [&](auto zero) {
    switch (row) {
      case DType::f32: return function(zero, std::integral_constant<DType, DType::f32>{});
      case DType::f64: return function(zero, std::integral_constant<DType, DType::f64>{});
      case DType::bf16: return function(zero, std::integral_constant<DType, DType::bf16>{});
      case DType::f16: return function(zero, std::integral_constant<DType, DType::f16>{});
      case DType::i8: return function(zero, std::integral_constant<DType, DType::i8>{});
    }
  });
}

template <class T, DType row>
Index tiles_of(Index numel) {
  return (numel + Tile<T, row>::kLength - 1) / Tile<T, row>::kLength;
}

// Sums of lbfgs_update over so many pairs and the open slot.
inline Index update_width(Index pairs) { return 4 * (pairs + 1) + kNorms; }

// Slices where the vector alone makes few blocks: as many as fill the device, of at least
// kLeastPairs pairs. `most_warps` of a share, with its pairs, fit into a block.
template <class T, DType row, class Warps>
Shares shares_of(Index slots, Index numel, Warps&& most_warps) {
  const Index tiles = tiles_of<T, row>(numel), pairs = slots - 1;
  Index columns = blocks_for(tiles, kWarps), slices = kFill / columns;
  if (slices > pairs / kLeastPairs) slices = pairs / kLeastPairs;
  if (slices > kMostSlices) slices = kMostSlices;
  if (slices < 1) slices = 1;
  Index share = (pairs + slices - 1) / slices;
  Index warps = most_warps(share);
  columns = blocks_for(tiles, warps);
  if (slices > 1 && (columns * warps < tiles || columns > kFill)) {
    slices = 1, share = pairs;
    warps = most_warps(share);
    columns = blocks_for(tiles, warps);
  }
  return {static_cast<int>(slices), static_cast<int>(columns), static_cast<int>(share),
          static_cast<int>(warps)};
}

template <class T, DType row>
Shares update_shares(Index slots, Index numel) {
  // Many pairs leave shared memory for the sums of few warps.
  return shares_of<T, row>(slots, numel, [](Index pairs) {
    const Index fit = kSharedBytes / (update_width(pairs) * static_cast<Index>(sizeof(double)));
    return fit < kWarps ? fit : kWarps;
  });
}
template <class T, DType row>
Shares direction_shares(Index slots, Index numel) {
  return shares_of<T, row>(slots, numel, [](Index) { return Index{kWarps}; });
}

template <class T>
PassArguments<T> pass_arguments(const Segments& segments, bool maximize, bool flag,
                                const Ring& ring, const void* grad_prev, double* control,
                                Workspace workspace) {
  PassArguments<T> a{};
  a.control = control;
  a.segments = segments;
  a.ring = ring;
  a.grad_prev = static_cast<T*>(const_cast<void*>(grad_prev));
  a.sign = maximize ? T(-1) : T(1);
  a.flag = flag;
  a.aligned = rows_are_aligned(ring) && is_aligned(grad_prev, 16);
  a.workspace = workspace;
  return a;
}

}  // namespace fuse_ext::cuda
