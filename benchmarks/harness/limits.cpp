// Reads and updates as fast as the memory allows: what the kernels are measured against.
// Compiled on its own by limits.py (no torch), so it also serves where the extension is not built.
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// A cache line of floats, at any address.
typedef float Line __attribute__((vector_size(64), aligned(4), may_alias));
constexpr std::int64_t kLine = 16;
constexpr std::int64_t kAhead = 64 * kLine;  // how far ahead to prefetch, in floats

template <class Work>
void on_threads(std::int64_t n, int threads, Work&& work) {
  const std::int64_t share = (n / threads + kLine - 1) / kLine * kLine;
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    const std::int64_t begin = t * share < n ? t * share : n;
    const std::int64_t end = t + 1 == threads || begin + share > n ? n : begin + share;
    others.emplace_back([=] { work(t, begin, end); });
  }
  work(0, 0, share < n && threads > 1 ? share : n);
  for (std::thread& other : others) other.join();
}

// Adds up `Streams` equal parts of [data, data + n) side by side.
template <int Streams>
float read_part(const float* data, std::int64_t n, bool prefetch) {
  const std::int64_t stream = n / Streams / kLine * kLine;
  Line sums[Streams] = {};
  for (std::int64_t i = 0; i < stream; i += kLine) {
    for (int s = 0; s < Streams; ++s) {
      const float* at = data + s * stream + i;
      if (prefetch) __builtin_prefetch(at + kAhead, 0, 0);
      sums[s] += *reinterpret_cast<const Line*>(at);
    }
  }
  float total = 0;
  for (const Line& sum : sums) {
    for (int k = 0; k < kLine; ++k) total += sum[k];
  }
  for (std::int64_t i = Streams * stream; i < n; ++i) total += data[i];
  return total;
}

// to[i] += factor * from[i]
void add(float* to, const float* from, std::int64_t begin, std::int64_t end, float factor,
         bool prefetch) {
  std::int64_t i = begin;
  for (; i + kLine <= end; i += kLine) {
    if (prefetch) {
      __builtin_prefetch(to + i + kAhead, 1, 0);
      __builtin_prefetch(from + i + kAhead, 0, 0);
    }
    *reinterpret_cast<Line*>(to + i) += factor * *reinterpret_cast<const Line*>(from + i);
  }
  for (; i < end; ++i) to[i] += factor * from[i];
}

void add_three(float* p, float* m, float* v, const float* g, std::int64_t begin, std::int64_t end,
               float a, float b, float c, bool prefetch) {
  std::int64_t i = begin;
  for (; i + kLine <= end; i += kLine) {
    if (prefetch) {
      __builtin_prefetch(p + i + kAhead, 1, 0);
      __builtin_prefetch(g + i + kAhead, 0, 0);
      __builtin_prefetch(m + i + kAhead, 1, 0);
      __builtin_prefetch(v + i + kAhead, 1, 0);
    }
    const Line grad = *reinterpret_cast<const Line*>(g + i);
    *reinterpret_cast<Line*>(p + i) += a * grad;
    *reinterpret_cast<Line*>(m + i) += b * grad;
    *reinterpret_cast<Line*>(v + i) += c * grad;
  }
  for (; i < end; ++i) {
    p[i] += a * g[i];
    m[i] += b * g[i];
    v[i] += c * g[i];
  }
}

}  // namespace

extern "C" {

// Asks for large pages under a buffer; 0 where the system agreed.
int limit_large_pages(void* address, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 4096;
  const std::uintptr_t begin =
      (reinterpret_cast<std::uintptr_t>(address) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end =
      reinterpret_cast<std::uintptr_t>(address) + static_cast<std::uintptr_t>(bytes);
  return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
  return 1;
#endif
}

// Reads n floats once: every thread its own stretch, as 1, 2, 4 or 8 streams.
float limit_read(const float* data, std::int64_t n, int streams, int prefetch, int threads) {
  std::vector<float> totals(static_cast<std::size_t>(threads) * kLine);
  on_threads(n, threads, [&](int t, std::int64_t begin, std::int64_t end) {
    const auto read = streams == 1   ? read_part<1>
                      : streams == 2 ? read_part<2>
                      : streams == 4 ? read_part<4>
                                     : read_part<8>;
    totals[static_cast<std::size_t>(t) * kLine] = read(data + begin, end - begin, prefetch != 0);
  });
  float total = 0;
  for (const float part : totals) total += part;
  return total;
}

// Adam's traffic and no more arithmetic than it takes: reads p, g, m, v and writes p, m, v, line by
// line, or for `blocked` p, m and v in turn over blocks that stay in the nearest cache.
// With a = b = c = 0 the values stay what they are.
void limit_update(float* p, const float* g, float* m, float* v, std::int64_t n, float a, float b,
                  float c, int blocked, int prefetch, int threads) {
  constexpr std::int64_t kBlock = 128 * kLine;
  on_threads(n, threads, [=](int, std::int64_t begin, std::int64_t end) {
    const std::int64_t block = blocked ? kBlock : end - begin;
    for (std::int64_t from = begin; from < end; from += block) {
      const std::int64_t to = from + block < end ? from + block : end;
      if (blocked) {
        add(p, g, from, to, a, prefetch);
        add(m, g, from, to, b, prefetch);
        add(v, g, from, to, c, prefetch);
      } else {
        add_three(p, m, v, g, from, to, a, b, c, prefetch);
      }
    }
  });
}

}  // extern "C"
