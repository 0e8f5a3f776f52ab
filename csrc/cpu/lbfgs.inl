// The L-BFGS passes. Each reads the history once: 2 m rows in `dots`, 2 m rows
// in `combine`.
#pragma once

#include "blocks.inl"

namespace fuse_ext {
namespace {

// Pointers into kRows rows.
template <class R, int kRows>
struct RowGroup {
  using Element = R;
  static constexpr int size = kRows;
  const R* row[kRows];
};

// Calls visit(group, index of its first row, first element, length) until all
// rows have been visited on [begin, begin + n), four at a time: enough streams
// for the memory system, few enough for the registers.
template <class T, class Visit>
FUSE_INLINE void for_each_row_group(const Rows& rows, std::int64_t begin, std::int64_t n,
                                    Visit&& visit) {
  if (rows.count == 0) return;
  const auto direct = [&](const auto* tag) {
    using R = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    const auto at = [&](std::int64_t r) { return static_cast<const R*>(rows.row[r].data) + begin; };
    std::int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4) {
      visit(RowGroup<R, 4>{{at(r), at(r + 1), at(r + 2), at(r + 3)}}, r, std::int64_t{0}, n);
    }
    for (; r < rows.count; ++r) visit(RowGroup<R, 1>{{at(r)}}, r, std::int64_t{0}, n);
  };
  const DType dtype = rows.row[0].dtype;
  if (dtype == dtype_of<T>()) return direct(static_cast<const T*>(nullptr));
  if (dtype == DType::bf16) return direct(static_cast<const BFloat16*>(nullptr));
  T scratch[4][kRun];
  for (std::int64_t done = 0; done < n; done += kRun) {
    const std::int64_t length = n - done < kRun ? n - done : kRun;
    const auto at = [&](std::int64_t r, int slot) {
      return read_row<T>(rows.row[r], begin + done, length, scratch[slot]);
    };
    std::int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4) {
      visit(RowGroup<T, 4>{{at(r, 0), at(r + 1, 1), at(r + 2, 2), at(r + 3, 3)}}, r, done, length);
    }
    for (; r < rows.count; ++r) visit(RowGroup<T, 1>{{at(r, 0)}}, r, done, length);
  }
}

// Dot products of `a`, and of `b` when with_b, with kRows rows at once, added
// to out_a, out_b.
template <class T, class R, int kRows, bool with_b>
FUSE_INLINE void dot_rows(const T* a, const T* b, const R* const* rows, std::int64_t n,
                          double* out_a, double* out_b) {
  static_assert(kRows == 1 || kRows == 4);
  const R* r0 = rows[0];
  const R* r1 = rows[kRows == 4 ? 1 : 0];
  const R* r2 = rows[kRows == 4 ? 2 : 0];
  const R* r3 = rows[kRows == 4 ? 3 : 0];
  for (std::int64_t done = 0; done < n; done += kRun) {
    const std::int64_t stop = n - done < kRun ? n : done + kRun;
    T a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
    for (std::int64_t i = done; i < stop; ++i) {
      const T v0 = load<T>(r0[i]);
      a0 = mul_add(a[i], v0, a0);
      if (with_b) b0 = mul_add(b[i], v0, b0);
      if (kRows == 4) {
        const T v1 = load<T>(r1[i]), v2 = load<T>(r2[i]), v3 = load<T>(r3[i]);
        a1 = mul_add(a[i], v1, a1);
        a2 = mul_add(a[i], v2, a2);
        a3 = mul_add(a[i], v3, a3);
        if (with_b) {
          b1 = mul_add(b[i], v1, b1);
          b2 = mul_add(b[i], v2, b2);
          b3 = mul_add(b[i], v3, b3);
        }
      }
    }
    const T sums_a[4] = {a0, a1, a2, a3}, sums_b[4] = {b0, b1, b2, b3};
    for (int r = 0; r < kRows; ++r) {
      out_a[r] += static_cast<double>(sums_a[r]);
      if (with_b) out_b[r] += static_cast<double>(sums_b[r]);
    }
  }
}

// The same with all rows, from `begin` on. Formats without a fast load are
// converted a run at a time.
template <class T, bool with_b>
FUSE_INLINE void dot_all_rows(const T* a, const T* b, const Rows& rows, std::int64_t begin,
                              std::int64_t n, double* out_a, double* out_b) {
  for_each_row_group<T>(
      rows, begin, n,
      [&](const auto& group, std::int64_t r, std::int64_t done, std::int64_t length) {
    using Group = std::remove_cvref_t<decltype(group)>;
    dot_rows<T, typename Group::Element, Group::size, with_b>(a + done, b + done, group.row, length,
                                                              out_a + r, out_b + r);
  });
}

// out += sum of coefs[r] * rows[r].
template <class T, class R, int kRows>
FUSE_INLINE void add_rows(const R* const* rows, const double* coefs, std::int64_t n, T* out) {
  static_assert(kRows == 1 || kRows == 4);
  const R* r0 = rows[0];
  const T c0 = static_cast<T>(coefs[0]);
  if constexpr (kRows == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = mul_add(c0, load<T>(r0[i]), out[i]);
  } else {
    const R *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const T c1 = static_cast<T>(coefs[1]), c2 = static_cast<T>(coefs[2]),
            c3 = static_cast<T>(coefs[3]);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const T newer = mul_add(c0, load<T>(r0[i]), c1 * load<T>(r1[i]));
      const T older = mul_add(c2, load<T>(r2[i]), c3 * load<T>(r3[i]));
      out[i] += newer + older;
    }
  }
}

template <class T>
FUSE_INLINE void add_all_rows(const Rows& rows, const double* coefs, std::int64_t begin,
                              std::int64_t n, T* out) {
  for_each_row_group<T>(
      rows, begin, n,
      [&](const auto& group, std::int64_t r, std::int64_t done, std::int64_t length) {
    using Group = std::remove_cvref_t<decltype(group)>;
    add_rows<T, typename Group::Element, Group::size>(group.row, coefs + r, length, out + done);
  });
}

template <class T>
void grad_stats(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
                const Row* direction, double* out) {
  T grad_scratch[kBlock], row_scratch[kBlock];
  double slope = 0, square = 0, absolute = 0, penalty = 0, maximum = 0;
  for (std::int64_t at = begin; at < end; at += kRun) {
    const std::int64_t n = end - at < kRun ? end - at : kRun;
    const T* g = load_gradient<T>(table, at, at + n, sign, grad_scratch);
    T sum_sq = 0, sum_abs = 0, max_abs = 0;
#pragma omp simd reduction(+ : sum_sq, sum_abs) reduction(max : max_abs)
    for (std::int64_t i = 0; i < n; ++i) {
      const T magnitude = g[i] < 0 ? -g[i] : g[i];
      sum_sq += g[i] * g[i];
      sum_abs += magnitude;
      max_abs = magnitude > max_abs ? magnitude : max_abs;
    }
    square += static_cast<double>(sum_sq);
    absolute += static_cast<double>(sum_abs);
    maximum = static_cast<double>(max_abs) > maximum ? static_cast<double>(max_abs) : maximum;
    if (direction != nullptr) {
      const T* p = read_row<T>(*direction, at, n, row_scratch);
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < n; ++i) sum += g[i] * p[i];
      slope += static_cast<double>(sum);
    }
    table.for_each_piece(
        at, at + n, [&](const Segment& s, std::int64_t first, std::int64_t, std::int64_t length) {
      if (s.weight_decay == 0.0) return;
      const T* x = read<T>(s.param_dtype, s.param, first, length, row_scratch);
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < length; ++i) sum += x[i] * x[i];
      penalty += 0.5 * s.weight_decay * static_cast<double>(sum);
    });
  }
  out[kGradDotDirection] = slope;
  out[kGradSq] = square;
  out[kGradAbsSum] = absolute;
  out[kPenalty] = penalty;
  out[kGradAbsMax] = maximum;
}

template <class T>
void dots(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
          const T* grad_prev, const Row* y_row, const Rows& rows, double* out) {
  double *out_g = out, *out_y = out + rows.count, *out_gy = out + 2 * rows.count;
  for (std::int64_t i = 0; i < 2 * rows.count + 2; ++i) out[i] = 0;
  T grad_scratch[kBlock], y[kBlock];
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t n = end - at < kBlock ? end - at : kBlock;
    const T* g = load_gradient<T>(table, at, at + n, sign, grad_scratch);
    if (y_row == nullptr) {
      dot_all_rows<T, false>(g, g, rows, at, n, out_g, out_y);
      continue;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) y[i] = g[i] - grad_prev[at + i];
    write_row<T>(*y_row, at, n, y);
    const T* self[1] = {y};
    dot_rows<T, T, 1, true>(g, y, self, n, out_gy, out_gy + 1);
    dot_all_rows<T, true>(g, y, rows, at, n, out_g, out_y);
  }
}

template <class T>
void combine(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
             const Rows& rows, const double* coefs, double coef_g, const Row& p_row, T* grad_prev,
             double* out) {
  T grad_scratch[kBlock], p[kBlock];
  double slope = 0, square = 0, maximum = 0;
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t n = end - at < kBlock ? end - at : kBlock;
    const T* g = load_gradient<T>(table, at, at + n, sign, grad_scratch);
    const T scale = static_cast<T>(coef_g);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) p[i] = scale * g[i];
    add_all_rows<T>(rows, coefs, at, n, p);
    table.for_each_piece(
        at, at + n, [&](const Segment& s, std::int64_t, std::int64_t flat, std::int64_t length) {
      if (s.lr_scale == 1.0) return;
      const T share = static_cast<T>(s.lr_scale);
      for (std::int64_t i = flat - at; i < flat - at + length; ++i) p[i] *= share;
    });
    write_row<T>(p_row, at, n, p);
    T* previous = grad_prev + at;
    for (std::int64_t done = 0; done < n; done += kRun) {
      const std::int64_t stop = n - done < kRun ? n : done + kRun;
      T sum_gp = 0, sum_pp = 0, max_abs = 0;
#pragma omp simd reduction(+ : sum_gp, sum_pp) reduction(max : max_abs)
      for (std::int64_t i = done; i < stop; ++i) {
        const T magnitude = p[i] < 0 ? -p[i] : p[i];
        sum_gp += g[i] * p[i];
        sum_pp += p[i] * p[i];
        max_abs = magnitude > max_abs ? magnitude : max_abs;
        previous[i] = g[i];
      }
      slope += static_cast<double>(sum_gp);
      square += static_cast<double>(sum_pp);
      maximum = static_cast<double>(max_abs) > maximum ? static_cast<double>(max_abs) : maximum;
    }
  }
  out[kDotGrad] = slope;
  out[kSq] = square;
  out[kMax] = maximum;
}

template <class T>
void move(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* origin,
          const Row& row, double step, bool save) {
  T param_scratch[kRun], row_scratch[kRun];
  const T length_of_step = static_cast<T>(step);
  table.for_each_piece(
      begin, end,
      [&](const Segment& s, std::int64_t first, std::int64_t flat, std::int64_t length) {
    for (std::int64_t done = 0; done < length; done += kRun) {
      const std::int64_t n = length - done < kRun ? length - done : kRun;
      T* from = origin + flat + done;
      if (save) {
        const T* x = read<T>(s.param_dtype, s.param, first + done, n, param_scratch);
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) from[i] = x[i];
      }
      if (step == 0.0) {
        if (!save) write<T>(s.param_dtype, s.param, first + done, n, from, false);
        continue;
      }
      const T* p = read_row<T>(row, flat + done, n, row_scratch);
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) param_scratch[i] = from[i] + length_of_step * p[i];
      write<T>(s.param_dtype, s.param, first + done, n, param_scratch, false);
    }
  });
}

template <class T>
void blend(const SegmentTable& table, std::int64_t begin, std::int64_t end, const T* origin,
           const Row& row, double theta, double step, double* out) {
  T param_scratch[kRun], row_scratch[kRun], taken[kRun];
  const T adam_share = static_cast<T>(theta), lbfgs_share = static_cast<T>(1.0 - theta);
  const T lbfgs_step = static_cast<T>(step);
  const bool mostly_adam = theta > 0.5;
  double square = 0;
  for (std::int64_t at = begin; at < end; at += kRun) {
    const std::int64_t n = end - at < kRun ? end - at : kRun;
    const T* p = read_row<T>(row, at, n, row_scratch);
    for (std::int64_t i = 0; i < n; ++i) taken[i] = T(0);
    table.for_each_piece(
        at, at + n,
        [&](const Segment& s, std::int64_t first, std::int64_t flat, std::int64_t length) {
      const T *from = origin + flat, *direction = p + (flat - at);
      const T* x = read<T>(s.param_dtype, s.param, first, length, param_scratch);
#pragma omp simd
      for (std::int64_t i = 0; i < length; ++i) {
        const T goal = from[i] + lbfgs_step * direction[i], gap = goal - x[i];
        // Exact at theta = 0 and 1, and where both iterates agree.
        param_scratch[i] = mostly_adam ? x[i] + lbfgs_share * gap : goal - adam_share * gap;
      }
      write<T>(s.param_dtype, s.param, first, length, param_scratch, true);
      T* step_taken = taken + (flat - at);
#pragma omp simd
      for (std::int64_t i = 0; i < length; ++i) step_taken[i] = param_scratch[i] - from[i];
    });
    write_row<T>(row, at, n, taken);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) sum += taken[i] * taken[i];
    square += static_cast<double>(sum);
  }
  out[0] = square;
}

template <class T>
void gather(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* flat) {
  T scratch[kRun];
  table.for_each_piece(
      begin, end, [&](const Segment& s, std::int64_t first, std::int64_t at, std::int64_t length) {
    for (std::int64_t done = 0; done < length; done += kRun) {
      const std::int64_t n = length - done < kRun ? length - done : kRun;
      const T* g = read<T>(s.grad_dtype, s.grad, first + done, n, scratch);
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) flat[at + done + i] = g[i];
    }
  });
}

template <class T>
void scatter(const SegmentTable& table, std::int64_t begin, std::int64_t end, const T* flat) {
  T scratch[kRun];
  table.for_each_piece(
      begin, end, [&](const Segment& s, std::int64_t first, std::int64_t at, std::int64_t length) {
    for (std::int64_t done = 0; done < length; done += kRun) {
      const std::int64_t n = length - done < kRun ? length - done : kRun;
      for (std::int64_t i = 0; i < n; ++i) scratch[i] = flat[at + done + i];
      write<T>(s.grad_dtype, const_cast<void*>(s.grad), first + done, n, scratch, false);
    }
  });
}

}  // namespace
}  // namespace fuse_ext
