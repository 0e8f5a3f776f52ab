// Splits a flat range into chunks, runs them on torch's thread pool and adds their partial
// results in order: the sums do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "kernels.h"

namespace fuse_ext {

// Few enough that their partial results are cheap beside the vectors. Short ranges are cut so that
// two threads have nearly as much to do. Depends on the range alone.
inline std::int64_t chunk_length(std::int64_t length) {
  constexpr std::int64_t kMostChunks = 256, kFewBlocks = 4, kSomeBlocks = 16;
  const auto equal_chunks = [&](std::int64_t most, std::int64_t unit) {
    return (length + most * unit - 1) / (most * unit) * unit;
  };
  if (length > kSomeBlocks * kBlock) return equal_chunks(kMostChunks, kBlock);
  if (length <= kBlock / 2) return kBlock / 2;
  if (length > kFewBlocks * kBlock) {
    const auto half_of_chunks = [&](std::int64_t chunk) {
      return ((length + chunk - 1) / chunk + 1) / 2 * chunk;
    };
    std::int64_t best = kBlock / 2;
    for (const std::int64_t chunk : {best - kRun, best + kRun}) {
      if (half_of_chunks(chunk) < half_of_chunks(best)) best = chunk;
    }
    return best;
  }
  return equal_chunks(2 * ((length + 2 * kBlock - 1) / (2 * kBlock)), kRun);
}

// Elements to read or write that are worth another thread: some 6 us of work, where waking one
// takes about 3 us on an idle machine and more on a busy one. torch's own grain is of this size.
constexpr std::int64_t kWorthAThread = std::int64_t{1} << 16;

// What a pass over a range does.
struct Pass {
  std::int64_t vectors;     // read or written, each once
  std::int64_t width = 0;   // numbers that it yields
  std::int64_t maxima = 0;  // the last so many of them are maxima, the others sums
};

// The fewest chunks worth a thread.
inline std::int64_t grain_of(const Pass& pass, std::int64_t chunk) {
  return kWorthAThread / (chunk * pass.vectors) + 1;
}

// Whether a pass over so many elements would run on several threads.
inline bool takes_threads(std::int64_t length, const Pass& pass) {
  const std::int64_t chunk = chunk_length(length), chunks = (length + chunk - 1) / chunk;
  return chunks > grain_of(pass, chunk) && at::get_num_threads() > 1 && !at::in_parallel_region();
}

// run(begin, end, out) fills out[0, width) for a part of the range; total[0, width) becomes that of
// the whole.
template <class Run>
void run_chunks(std::int64_t begin, std::int64_t end, const Pass& pass, double* total, Run&& run) {
  const std::int64_t width = pass.width;
  for (std::int64_t k = 0; k < width; ++k) total[k] = 0;
  if (begin >= end) return;
  const std::int64_t chunk = chunk_length(end - begin);
  const std::int64_t chunks = (end - begin + chunk - 1) / chunk;
  if (chunks == 1) return run(begin, end, total);
  std::vector<double> partial(static_cast<std::size_t>(chunks * width));
  at::parallel_for(0, chunks, grain_of(pass, chunk), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t from = begin + i * chunk;
      run(from, from + chunk < end ? from + chunk : end, partial.data() + i * width);
    }
  });
  for (std::int64_t i = 0; i < chunks; ++i) {
    for (std::int64_t k = 0; k < width; ++k) {
      const double value = partial[static_cast<std::size_t>(i * width + k)];
      if (k < width - pass.maxima) {
        total[k] += value;
      } else if (value > total[k]) {
        total[k] = value;
      }
    }
  }
}

}  // namespace fuse_ext
