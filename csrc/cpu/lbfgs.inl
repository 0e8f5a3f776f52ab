// The L-BFGS passes. Each reads the history once: 2 m rows in `dots`, 2 m rows
// in `combine`.
#pragma once

#include "rows.inl"

namespace fuse_ext {
namespace {

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
void largest_param(const SegmentTable& table, std::int64_t begin, std::int64_t end, double* out) {
  T scratch[kRun], largest = 0;
  table.for_each_piece(
      begin, end, [&](const Segment& s, std::int64_t first, std::int64_t, std::int64_t length) {
    for (std::int64_t done = 0; done < length; done += kRun) {
      const std::int64_t n = length - done < kRun ? length - done : kRun;
      const T* x = read<T>(s.param_dtype, s.param, first + done, n, scratch);
#pragma omp simd reduction(max : largest)
      for (std::int64_t i = 0; i < n; ++i) {
        const T magnitude = x[i] < 0 ? -x[i] : x[i];
        largest = magnitude > largest ? magnitude : largest;
      }
    }
  });
  out[0] = static_cast<double>(largest);
}

// Elements of g and of y or p at a time: few, so that they stay in the L1 cache, where rows come
// from a cache or such a piece of a row is long enough; else, as rows come from the memory best in
// long pieces, more.
FUSE_INLINE std::int64_t block_beside(const Rows& rows, bool long_enough) {
  return rows.ahead == 0 || long_enough ? kBlock / 4 : kBlock;
}

// Beside rows from the memory the dense vectors are fetched ahead for so many elements at once, by
// a page, as the hardware does not read ahead over the end of one. The last run of a block fetches
// for the next, before the rows' turn.
constexpr std::int64_t kFetchRun = 256, kFetchAhead = 4096;

template <class T>
void dots(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
          const T* grad_prev, const Row* y_row, const Rows& rows, double* out) {
  double *out_g = out, *out_y = out + rows.count;
  for (std::int64_t i = 0; i < 2 * rows.count; ++i) out[i] = 0;
  // By measurement: 8 KiB of a float32 row are, of a narrower one 16 or 8 KiB are better than less.
  const bool long_enough = rows.count > 0 && rows.row[0].dtype == dtype_of<T>();
  const std::int64_t block = block_beside(rows, long_enough);
  const bool rows_are_far = rows.ahead != 0;
  T grad_scratch[kBlock], y_scratch[kBlock];
  for (std::int64_t at = begin; at < end; at += block) {
    const std::int64_t n = end - at < block ? end - at : block;
    const T* g = load_gradient<T>(table, at, at + n, sign, grad_scratch);
    if (y_row == nullptr) {
      dot_all_rows<T, false>(g, g, rows, at, n, out_g, out_y);
      continue;
    }
    T* y = place_in_row<T>(*y_row, at, y_scratch);
    for (std::int64_t run = 0; run < n; run += kFetchRun) {
      if (rows_are_far) {
        fetch_ahead<kFetchRun>(g + run, kFetchAhead);
        fetch_ahead<kFetchRun>(grad_prev + at + run, kFetchAhead);
      }
      const std::int64_t stop = n - run < kFetchRun ? n : run + kFetchRun;
#pragma omp simd
      for (std::int64_t i = run; i < stop; ++i) y[i] = g[i] - grad_prev[at + i];
    }
    write_row<T>(*y_row, at, n, y);
    dot_all_rows<T, true>(g, y, rows, at, n, out_g, out_y);
  }
}

// param = origin + step * p on n elements, at most kRun, from a segment's element `first` on; with
// save, origin <- param before. p may be null where step is 0.
template <class T>
FUSE_INLINE void move_run(const Segment& s, std::int64_t first, std::int64_t n, const T* p,
                          double step, T* origin, bool save, PastCaches past) {
  const bool far = past == PastCaches::vectors;
  T scratch[kRun];
  const T* from = origin;
  if (save) {
    from = read<T>(s.param_dtype, s.param, first, n, scratch);
    if (far) copy_past_caches(from, n, origin);
  } else if (step == 0.0) {
    write<T>(s.param_dtype, s.param, first, n, origin, false);
  }
  const bool keep = save && !far;
  if (step == 0.0) {
    for (std::int64_t i = 0; keep && i < n; ++i) origin[i] = from[i];
    return;
  }
  const T length_of_step = static_cast<T>(step);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const T x = from[i];
    if (keep) origin[i] = x;
    scratch[i] = x + length_of_step * p[i];
  }
  if (past == PastCaches::params && s.param_dtype == dtype_of<T>()) {
    copy_past_caches(scratch, n, static_cast<T*>(s.param) + first);
  } else {
    write<T>(s.param_dtype, s.param, first, n, scratch, false);
  }
}

// As write_row, without reading what lies there into the caches first.
template <class T>
FUSE_INLINE void write_row_past_caches(const Row& row, std::int64_t first, std::int64_t n,
                                       T* values) {
  if (row.dtype == dtype_of<T>()) {
    return copy_past_caches(values, n, static_cast<T*>(row.data) + first);
  }
  double stored[kBlock];  // room for any dtype
  float* const scales = row.dtype == DType::i8 ? row.scales + first / kScaleBlock : nullptr;
  write_row<T>({stored, scales, row.dtype}, 0, n, values);
  copy_past_caches(reinterpret_cast<const char*>(stored), n * size_of(row.dtype),
                   static_cast<char*>(row.data) + first * size_of(row.dtype));
}

template <class T>
void combine(const SegmentTable& table, std::int64_t begin, std::int64_t end, T sign,
             const Rows& rows, const double* coefs, double coef_g, const Row& p_row, T* grad_prev,
             T* origin, double step, PastCaches past, double* out) {
  const bool far = past == PastCaches::vectors;
  const bool rows_are_far = rows.ahead != 0, p_is_far = far && p_row.dtype == dtype_of<T>();
  const std::int64_t block = block_beside(rows, false);
  T grad_scratch[kBlock], p_scratch[kBlock];
  double slope = 0, square = 0, maximum = 0;
  for (std::int64_t at = begin; at < end; at += block) {
    const std::int64_t n = end - at < block ? end - at : block;
    const T* g = load_gradient<T>(table, at, at + n, sign, grad_scratch);
    T* p = p_is_far ? p_scratch : place_in_row<T>(p_row, at, p_scratch);
    const T scale = static_cast<T>(coef_g);
    for (std::int64_t run = 0; run < n; run += kFetchRun) {
      if (rows_are_far) fetch_ahead<kFetchRun>(g + run, kFetchAhead);
      const std::int64_t stop = n - run < kFetchRun ? n : run + kFetchRun;
#pragma omp simd
      for (std::int64_t i = run; i < stop; ++i) p[i] = scale * g[i];
    }
    add_all_rows<T>(rows, coefs, at, n, p);
    table.for_each_piece(
        at, at + n, [&](const Segment& s, std::int64_t, std::int64_t flat, std::int64_t length) {
      if (s.lr_scale == 1.0) return;
      const T share = static_cast<T>(s.lr_scale);
      for (std::int64_t i = flat - at; i < flat - at + length; ++i) p[i] *= share;
    });
    if (far) {
      write_row_past_caches<T>(p_row, at, n, p);
    } else {
      write_row<T>(p_row, at, n, p);
    }
    T* const previous = grad_prev + at;
    const auto sum_up = [&](auto keep_g) {
      for (std::int64_t done = 0; done < n; done += kRun) {
        const std::int64_t stop = n - done < kRun ? n : done + kRun;
        T sum_gp = 0, sum_pp = 0, max_abs = 0;
#pragma omp simd reduction(+ : sum_gp, sum_pp) reduction(max : max_abs)
        for (std::int64_t i = done; i < stop; ++i) {
          const T magnitude = p[i] < 0 ? -p[i] : p[i];
          sum_gp += g[i] * p[i];
          sum_pp += p[i] * p[i];
          max_abs = magnitude > max_abs ? magnitude : max_abs;
          if (keep_g) previous[i] = g[i];
        }
        slope += static_cast<double>(sum_gp);
        square += static_cast<double>(sum_pp);
        maximum = static_cast<double>(max_abs) > maximum ? static_cast<double>(max_abs) : maximum;
      }
    };
    if (far) {
      sum_up(std::false_type{});
      copy_past_caches(g, n, previous);
    } else {
      sum_up(std::true_type{});
    }
    if (origin == nullptr) continue;
    table.for_each_piece(
        at, at + n,
        [&](const Segment& s, std::int64_t first, std::int64_t flat, std::int64_t length) {
      for (std::int64_t done = 0; done < length; done += kRun) {
        if (rows_are_far && s.param_dtype == dtype_of<T>()) {
          fetch_ahead<kRun>(static_cast<const T*>(s.param) + first + done, kFetchAhead);
        }
        const std::int64_t run = length - done < kRun ? length - done : kRun;
        const std::int64_t place = flat + done;
        move_run(s, first + done, run, p + (place - at), step, origin + place, true, past);
      }
    });
  }
  if (past != PastCaches::nothing) end_copies_past_caches();
  out[kDotGrad] = slope;
  out[kSq] = square;
  out[kMax] = maximum;
}

template <class T>
void move(const SegmentTable& table, std::int64_t begin, std::int64_t end, T* origin,
          const Row& row, double step, bool save, PastCaches past) {
  T row_scratch[kRun];
  table.for_each_piece(
      begin, end,
      [&](const Segment& s, std::int64_t first, std::int64_t flat, std::int64_t length) {
    for (std::int64_t done = 0; done < length; done += kRun) {
      const std::int64_t n = length - done < kRun ? length - done : kRun;
      const T* p = step == 0.0 ? nullptr : read_row<T>(row, flat + done, n, row_scratch);
      move_run(s, first + done, n, p, step, origin + flat + done, save, past);
    }
  });
  if (past != PastCaches::nothing) end_copies_past_caches();
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
