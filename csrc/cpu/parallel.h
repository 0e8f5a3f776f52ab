// Splits a flat range into chunks, runs them on torch's thread pool and adds their partial
// results in order: the sums do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "kernels.h"

namespace fuse_ext {

// Chunks are long enough to be worth a thread, and few enough that their partial results are
// cheap beside the vectors. Depends on the range alone.
inline std::int64_t chunk_length(std::int64_t length) {
  constexpr std::int64_t kMostChunks = 256;
  const std::int64_t blocks = (length + kMostChunks * kBlock - 1) / (kMostChunks * kBlock);
  return (blocks > 1 ? blocks : 1) * kBlock;
}

// run(begin, end, out) fills out[0, width); the last `maxima` of them are maxima, the others sums.
template <class Run>
void run_chunks(std::int64_t begin, std::int64_t end, std::int64_t width, std::int64_t maxima,
                double* total, Run&& run) {
  for (std::int64_t k = 0; k < width; ++k) total[k] = 0;
  if (begin >= end) return;
  const std::int64_t chunk = chunk_length(end - begin);
  const std::int64_t chunks = (end - begin + chunk - 1) / chunk;
  if (chunks == 1) return run(begin, end, total);
  std::vector<double> partial(static_cast<std::size_t>(chunks * width));
  at::parallel_for(0, chunks, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t from = begin + i * chunk;
      run(from, from + chunk < end ? from + chunk : end, partial.data() + i * width);
    }
  });
  for (std::int64_t i = 0; i < chunks; ++i) {
    for (std::int64_t k = 0; k < width; ++k) {
      const double value = partial[static_cast<std::size_t>(i * width + k)];
      if (k < width - maxima) {
        total[k] += value;
      } else if (value > total[k]) {
        total[k] = value;
      }
    }
  }
}

}  // namespace fuse_ext
