// Many rows of the history at once: dot products with all of them, linear combinations of them.
//
// A row of narrow elements is read as 32-bit words, each of kPlanes neighbours. Element i is number
// i % kPlanes of its word; a plane is the vector of those elements of a vector of words that have
// one number. A shift or a mask takes a plane out of the words, where putting the elements in order
// would cost more than the arithmetic on them. It is the dense vectors that are put in the order of
// planes, once for all rows.
#pragma once

#include <type_traits>
#include <utility>

#include "lanes.inl"

#define FUSE_LAMBDA __attribute__((always_inline))

namespace fuse_ext {
namespace {

// The formats of rows. scale(i): the factor of the elements around i, which planes leave out;
// constant over kSumRun elements.
template <class T>
struct DenseRow {
  using Scalar = T;
  using Read = Lanes<T>;
  static constexpr int kPlanes = 1;
  static constexpr std::int64_t kSumRun = kRun;

  const T* data;

  FUSE_MEMBER Read read(std::int64_t i) const { return load_lanes(data + i); }
  FUSE_MEMBER T scale(std::int64_t) const { return T(1); }
  template <int plane>
  FUSE_MEMBER static Lanes<T> plane_of(Read read) {
    return read;
  }
};

struct BFloat16Row {
  using Scalar = float;
  using Read = Words;
  static constexpr int kPlanes = 2;
  static constexpr std::int64_t kSumRun = kRun;

  const BFloat16* data;

  FUSE_MEMBER explicit BFloat16Row(const Row& row) : data(static_cast<const BFloat16*>(row.data)) {}
  FUSE_MEMBER Read read(std::int64_t i) const { return load_words(data + i); }
  FUSE_MEMBER float scale(std::int64_t) const { return 1.0f; }
  template <int plane>
  FUSE_MEMBER static Lanes<float> plane_of(Read read) {
    return (Lanes<float>)(plane == 0 ? read << 16 : read & 0xffff0000u);
  }
};

struct Int8Row {
  using Scalar = float;
  static constexpr std::int64_t kSumRun = kScaleBlock;

  const std::int8_t* data;
  const float* scales;

  FUSE_MEMBER explicit Int8Row(const Row& row)
      : data(static_cast<const std::int8_t*>(row.data)), scales(row.scales) {}

#if defined(FUSE_CPU_WIDENS)
  using Read = Lanes<float>;
  static constexpr int kPlanes = 1;

  FUSE_MEMBER Read read(std::int64_t i) const { return load_bytes(data + i); }
  FUSE_MEMBER float scale(std::int64_t i) const { return scales[i / kScaleBlock]; }
  template <int plane>
  FUSE_MEMBER static Lanes<float> plane_of(Read read) {
    return read;
  }
#else
  // A plane holds whole numbers times 2^24: bytes in the places of the highest ones.
  using Read = Words;
  static constexpr int kPlanes = 4;

  FUSE_MEMBER Read read(std::int64_t i) const { return load_words(data + i); }
  FUSE_MEMBER float scale(std::int64_t i) const { return 0x1p-24f * scales[i / kScaleBlock]; }
  template <int plane>
  FUSE_MEMBER static Lanes<float> plane_of(Read read) {
    const Words moved = plane == 3 ? read : read << (24 - 8 * plane);
    const Words top = plane == 0 ? moved : moved & 0xff000000u;
    return __builtin_convertvector((Lanes<std::int32_t>)top, Lanes<float>);
  }
#endif
};

static_assert(kScaleBlock % (4 * kLanes<float>) == 0 && kRun % kScaleBlock == 0);

// Calls visit(0), ..., visit(kCount - 1) with constants: arrays that only these index can stay in
// registers.
template <class Visit, int... k>
FUSE_INLINE void for_each_constant(Visit&& visit, std::integer_sequence<int, k...>) {
  (visit(std::integral_constant<int, k>{}), ...);
}
template <int kCount, class Visit>
FUSE_INLINE void for_each_constant(Visit&& visit) {
  for_each_constant(visit, std::make_integer_sequence<int, kCount>{});
}

// In order -> in planes, and back; n is a multiple of kScaleBlock.
template <int kPlanes>
FUSE_INLINE void to_planes(const float* in, std::int64_t n, float* out) {
  constexpr std::int64_t kLength = kLanes<float>;
  for (std::int64_t i = 0; i < n; i += kPlanes * kLength) {
    for (std::int64_t j = 0; j < kLength; ++j) {
      for (int k = 0; k < kPlanes; ++k) out[i + k * kLength + j] = in[i + kPlanes * j + k];
    }
  }
}
template <int kPlanes>
FUSE_INLINE void from_planes(const float* in, std::int64_t n, float* out) {
  constexpr std::int64_t kLength = kLanes<float>;
  for (std::int64_t i = 0; i < n; i += kPlanes * kLength) {
    for (std::int64_t j = 0; j < kLength; ++j) {
      for (int k = 0; k < kPlanes; ++k) out[i + kPlanes * j + k] = in[i + k * kLength + j];
    }
  }
}

// n values, which may lie there already, and zeros up to `length`.
template <class T>
FUSE_INLINE void fill_up(const T* values, std::int64_t n, std::int64_t length, T* out) {
  if (values != out) std::memcpy(out, values, static_cast<std::size_t>(n) * sizeof(T));
  for (std::int64_t i = n; i < length; ++i) out[i] = T(0);
}

// Vectors of the dense operands that registers are left for beside the sums.
constexpr int kFarVectors = FUSE_CPU_LANE_BYTES >= 64 ? 4 : 2;

// So many reads of a row one after the other, rather than one of each row in turn, where the rows
// come from the memory (`far`): it delivers neighbouring lines faster. From a cache that only costs
// registers.
template <class Format>
constexpr int kFarReads = kFarVectors > Format::kPlanes ? kFarVectors / Format::kPlanes : 1;

// Calls visit(i, reads of each row at a time, as a constant) for [i, stop).
template <class Format, bool far, class Visit>
FUSE_INLINE void for_each_reads(std::int64_t i, std::int64_t stop, Visit&& visit) {
  constexpr std::int64_t kStep = Format::kPlanes * kLanes<typename Format::Scalar>;
  constexpr int kReads = kFarReads<Format>;
  if constexpr (far && kReads > 1) {
    for (; i + kReads * kStep <= stop; i += kReads * kStep) {
      visit(i, std::integral_constant<int, kReads>{});
    }
  }
  for (; i < stop; i += kStep) visit(i, std::integral_constant<int, 1>{});
}

// Calls visit(which of the dense vectors, as a constant; the row's vector for it) for kReads reads
// of a row from element i on.
template <int kReads, bool far, class Format, class Visit>
FUSE_INLINE void for_each_plane(const Format& row, std::int64_t i, std::int64_t ahead,
                                Visit&& visit) {
  constexpr std::int64_t kStep = Format::kPlanes * kLanes<typename Format::Scalar>;
  if constexpr (far) fetch_ahead<kReads * kStep>(row.data + i, ahead);
  for_each_constant<kReads>([&](auto u) FUSE_LAMBDA {
    const typename Format::Read read = row.read(i + u * kStep);
    for_each_constant<Format::kPlanes>([&](auto plane) FUSE_LAMBDA {
      visit(std::integral_constant<int, u * Format::kPlanes + plane>{},
            Format::template plane_of<plane>(read));
    });
  });
}

// Adds to totals_a (and totals_b when with_b), a vector for each row, the products of `a` and `b`
// with kRows rows on [at, at + n), at most kRun elements; those of kSumRun elements are added up by
// themselves. A function by itself, as the compiler would else give the totals registers that the
// sums need.
template <class Format, int kRows, bool with_b, bool far, class T = typename Format::Scalar>
[[gnu::noinline]] void dot_run(const T* a, const T* b, const Format* rows, std::int64_t at,
                               std::int64_t n, std::int64_t ahead, Lanes<T>* totals_a,
                               Lanes<T>* totals_b) {
  constexpr std::int64_t kLength = kLanes<T>;
  Lanes<T> run_a[kRows] = {}, run_b[kRows] = {};
  for (std::int64_t first = 0; first < n; first += Format::kSumRun) {
    const std::int64_t stop = n - first < Format::kSumRun ? n : first + Format::kSumRun;
    Lanes<T> sums_a[kRows] = {}, sums_b[kRows] = {};
    for_each_reads<Format, far>(first, stop, [&](std::int64_t i, auto reads) FUSE_LAMBDA {
      constexpr int kVectors = reads * Format::kPlanes;
      Lanes<T> elements_a[kVectors], elements_b[kVectors];
      for_each_constant<kVectors>([&](auto k) FUSE_LAMBDA {
        elements_a[k] = load_lanes(a + i + k * kLength);
        if (with_b) elements_b[k] = load_lanes(b + i + k * kLength);
      });
      for_each_constant<kRows>([&](auto r) FUSE_LAMBDA {
        for_each_plane<reads, far>(rows[r], at + i, ahead,
                                   [&](auto k, Lanes<T> element) FUSE_LAMBDA {
          sums_a[r] = mul_add_lanes(elements_a[k], element, sums_a[r]);
          if (with_b) sums_b[r] = mul_add_lanes(elements_b[k], element, sums_b[r]);
        });
      });
    });
    for_each_constant<kRows>([&](auto r) FUSE_LAMBDA {
      const Lanes<T> scale = all_lanes(rows[r].scale(at + first));
      run_a[r] = mul_add_lanes(scale, sums_a[r], run_a[r]);
      if (with_b) run_b[r] = mul_add_lanes(scale, sums_b[r], run_b[r]);
    });
  }
  for_each_constant<kRows>([&](auto r) FUSE_LAMBDA {
    totals_a[r] += run_a[r];
    if (with_b) totals_b[r] += run_b[r];
  });
}

// Dot products of `a`, and of `b` when with_b, with kRows rows on [at, at + n), added to out_a and
// out_b. a and b are in the order of planes and begin at `at`, a multiple of kScaleBlock (as is n)
// but for dense rows.
template <class Format, int kRows, bool with_b, class T = typename Format::Scalar>
FUSE_INLINE void dot_rows(const T* a, const T* b, const Format* rows, std::int64_t at,
                          std::int64_t n, std::int64_t ahead, double* out_a, double* out_b) {
  Lanes<T> totals_a[kRows] = {}, totals_b[kRows] = {};
  for (std::int64_t run = 0; run < n; run += kRun) {
    const std::int64_t length = n - run < kRun ? n - run : kRun;
    const auto dot =
        ahead != 0 ? dot_run<Format, kRows, with_b, true> : dot_run<Format, kRows, with_b, false>;
    dot(a + run, b + run, rows, at + run, length, ahead, totals_a, totals_b);
  }
  for (int r = 0; r < kRows; ++r) {
    out_a[r] += sum_of_lanes(totals_a[r]);
    if (with_b) out_b[r] += sum_of_lanes(totals_b[r]);
  }
}

// out += sum of coefs[r] * rows[r] on [at, at + n), under the same conditions.
template <class Format, int kRows, bool far, class T = typename Format::Scalar>
FUSE_INLINE void add_rows(const Format* rows, const double* coefs, std::int64_t at, std::int64_t n,
                          std::int64_t ahead, T* out) {
  constexpr std::int64_t kLength = kLanes<T>;
  for (std::int64_t run = 0; run < n; run += Format::kSumRun) {
    const std::int64_t stop = n - run < Format::kSumRun ? n : run + Format::kSumRun;
    Lanes<T> factors[kRows];
    for_each_constant<kRows>([&](auto r) FUSE_LAMBDA {
      const double scale = static_cast<double>(rows[r].scale(at + run));
      factors[r] = all_lanes(static_cast<T>(coefs[r] * scale));
    });
    for_each_reads<Format, far>(run, stop, [&](std::int64_t i, auto reads) FUSE_LAMBDA {
      constexpr int kVectors = reads * Format::kPlanes;
      Lanes<T> even[kVectors], odd[kVectors];  // two shorter chains
      for_each_constant<kVectors>([&](auto k) FUSE_LAMBDA {
        even[k] = load_lanes(out + i + k * kLength);
        odd[k] = Lanes<T>{};
      });
      for_each_constant<kRows>([&](auto r) FUSE_LAMBDA {
        for_each_plane<reads, far>(rows[r], at + i, ahead,
                                   [&](auto k, Lanes<T> element) FUSE_LAMBDA {
          Lanes<T>& sum = r % 2 == 0 ? even[k] : odd[k];
          sum = mul_add_lanes(factors[r], element, sum);
        });
      });
      for_each_constant<kVectors>(
          [&](auto k) FUSE_LAMBDA { store_lanes(out + i + k * kLength, even[k] + odd[k]); });
    });
  }
}

// Rows handled together: enough streams for the memory system, few enough for the registers.
constexpr int kGroup = FUSE_CPU_LANE_BYTES >= 64 ? 8 : 4;

// Calls visit(rows made by make(index, place in the group), their number as a constant, index of
// the first) for all rows, in groups.
template <class Format, class Make, class Visit>
FUSE_INLINE void for_each_group(std::int64_t count, Make&& make, Visit&& visit) {
  std::int64_t first = 0;
  const auto visit_while = [&](auto size) {
    for (; first + size <= count; first += size) {
      [&]<int... r>(std::integer_sequence<int, r...>) {
        const Format group[] = {make(first + r, r)...};
        visit(group, size, first);
      }(std::make_integer_sequence<int, size>{});
    }
  };
  visit_while(std::integral_constant<int, kGroup>{});
  if constexpr (kGroup > 4) visit_while(std::integral_constant<int, 4>{});
  visit_while(std::integral_constant<int, 2>{});
  visit_while(std::integral_constant<int, 1>{});
}

// Calls visit(format tag, make) where rows of this dtype are used as they are in memory. Else
// returns false: they have to be converted.
template <class T, class Visit>
FUSE_INLINE bool with_row_format(const Rows& rows, Visit&& visit) {
  const DType dtype = rows.row[0].dtype;
  if (dtype == dtype_of<T>()) {
    visit(std::type_identity<DenseRow<T>>{}, [&](std::int64_t r, int) {
      return DenseRow<T>{static_cast<const T*>(rows.row[r].data)};
    });
    return true;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::bf16) {
      visit(std::type_identity<BFloat16Row>{},
            [&](std::int64_t r, int) { return BFloat16Row(rows.row[r]); });
      return true;
    }
    if (dtype == DType::i8) {
      visit(std::type_identity<Int8Row>{},
            [&](std::int64_t r, int) { return Int8Row(rows.row[r]); });
      return true;
    }
  }
  return false;
}

// For other formats: runs of rows, converted. Calls visit(make, elements done, length).
template <class T, class Visit>
FUSE_INLINE void with_converted_runs(const Rows& rows, std::int64_t at, std::int64_t n,
                                     Visit&& visit) {
  T scratch[kGroup][kRun];
  for (std::int64_t done = 0; done < n; done += kRun) {
    const std::int64_t length = n - done < kRun ? n - done : kRun;
    visit([&](std::int64_t r, int place) {
      return DenseRow<T>{read_row<T>(rows.row[r], at + done, length, scratch[place])};
    }, done, length);
  }
}

// For the fewer than kScaleBlock elements behind the last whole block: rows converted and filled up
// with zeros to whole vectors. Calls visit(make, length).
template <class T, class Visit>
FUSE_INLINE void with_rest(const Rows& rows, std::int64_t at, std::int64_t n, Visit&& visit) {
  const std::int64_t length = (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T scratch[kGroup][kScaleBlock];
  visit([&](std::int64_t r, int place) {
    T* const row = scratch[place];
    fill_up(read_row<T>(rows.row[r], at, n, row), n, length, row);
    return DenseRow<T>{row};
  }, length);
}

// Dot products of `a`, and of `b` when with_b, with all rows from `at` on, added to out_a, out_b.
template <class T, bool with_b>
FUSE_INLINE void dot_all_rows(const T* a, const T* b, const Rows& rows, std::int64_t at,
                              std::int64_t n, double* out_a, double* out_b) {
  if (rows.count == 0) return;
  const std::int64_t whole = n / kScaleBlock * kScaleBlock;
  const bool direct = with_row_format<T>(rows, [&](auto tag, auto&& make) {
    using Format = typename decltype(tag)::type;
    const T *planes_a = a, *planes_b = b;
    T scratch_a[Format::kPlanes > 1 ? kBlock : 1], scratch_b[Format::kPlanes > 1 ? kBlock : 1];
    if constexpr (Format::kPlanes > 1) {
      to_planes<Format::kPlanes>(a, whole, scratch_a);
      if (with_b) to_planes<Format::kPlanes>(b, whole, scratch_b);
      planes_a = scratch_a, planes_b = with_b ? scratch_b : scratch_a;
    }
    for_each_group<Format>(rows.count, make,
                           [&](const Format* group, auto size, std::int64_t first) {
      dot_rows<Format, size, with_b>(planes_a, planes_b, group, at, whole, rows.ahead,
                                     out_a + first, out_b + first);
    });
  });
  if (!direct) {
    with_converted_runs<T>(rows, at, whole,
                           [&](auto&& make, std::int64_t done, std::int64_t length) {
      for_each_group<DenseRow<T>>(rows.count, make,
                                  [&](const DenseRow<T>* group, auto size, std::int64_t first) {
        dot_rows<DenseRow<T>, size, with_b>(a + done, b + done, group, 0, length, 0, out_a + first,
                                            out_b + first);
      });
    });
  }
  if (whole == n) return;
  with_rest<T>(rows, at + whole, n - whole, [&](auto&& make, std::int64_t length) {
    T rest_a[kScaleBlock], rest_b[kScaleBlock];
    fill_up(a + whole, n - whole, length, rest_a);
    if (with_b) fill_up(b + whole, n - whole, length, rest_b);
    for_each_group<DenseRow<T>>(rows.count, make,
                                [&](const DenseRow<T>* group, auto size, std::int64_t first) {
      dot_rows<DenseRow<T>, size, with_b>(rest_a, with_b ? rest_b : rest_a, group, 0, length, 0,
                                          out_a + first, out_b + first);
    });
  });
}

// out += sum of coefs[r] * rows[r], from `at` on.
template <class T>
FUSE_INLINE void add_all_rows(const Rows& rows, const double* coefs, std::int64_t at,
                              std::int64_t n, T* out) {
  if (rows.count == 0) return;
  const std::int64_t whole = n / kScaleBlock * kScaleBlock;
  const bool direct = with_row_format<T>(rows, [&](auto tag, auto&& make) {
    using Format = typename decltype(tag)::type;
    T scratch[Format::kPlanes > 1 ? kBlock : 1];
    T* planes = out;
    if constexpr (Format::kPlanes > 1) {
      to_planes<Format::kPlanes>(out, whole, scratch);
      planes = scratch;
    }
    for_each_group<Format>(rows.count, make,
                           [&](const Format* group, auto size, std::int64_t first) {
      if (rows.ahead != 0) {
        add_rows<Format, size, true>(group, coefs + first, at, whole, rows.ahead, planes);
      } else {
        add_rows<Format, size, false>(group, coefs + first, at, whole, 0, planes);
      }
    });
    if constexpr (Format::kPlanes > 1) from_planes<Format::kPlanes>(scratch, whole, out);
  });
  if (!direct) {
    with_converted_runs<T>(rows, at, whole,
                           [&](auto&& make, std::int64_t done, std::int64_t length) {
      for_each_group<DenseRow<T>>(rows.count, make,
                                  [&](const DenseRow<T>* group, auto size, std::int64_t first) {
        add_rows<DenseRow<T>, size, false>(group, coefs + first, 0, length, 0, out + done);
      });
    });
  }
  T rest[kScaleBlock];
  for (std::int64_t r = 0; whole < n && r < rows.count; ++r) {
    const T* row = read_row<T>(rows.row[r], at + whole, n - whole, rest);
    const T factor = static_cast<T>(coefs[r]);
    for (std::int64_t i = whole; i < n; ++i) out[i] = mul_add(factor, row[i - whole], out[i]);
  }
}

}  // namespace
}  // namespace fuse_ext
