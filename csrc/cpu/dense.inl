// Passes over the dense inverse Hessian (broyden.h), a row of tiles at a time. In double.
#pragma once

#include "lanes.inl"

namespace fuse_ext {
namespace {

// Rows of a tile that are worked on together: as many as leave registers for the rest.
constexpr std::int64_t kRowsAtOnce = FUSE_CPU_LANE_BYTES == 64 ? 8 : 4;

// Bytes that tiles are fetched ahead of their use, by measurement: caches fetch on their own, but
// not fast enough for one core to see all of the memory's bandwidth.
constexpr std::int64_t kAhead = 8192;

// y += what the rows of tiles [first, last) and their mirror images give of M x. `y` is whole.
void matrix_product(const double* matrix, std::int64_t first, std::int64_t last, const double* x,
                    double* y) {
  constexpr std::int64_t kWidth = kLanes<double>;
  for (std::int64_t i = first; i < last; ++i) {
    const double* tiles = matrix + tiles_before(i) * kTileSize;
    for (std::int64_t from = 0; from < kTile; from += kRowsAtOnce) {
      const double *own_x = x + i * kTile + from, *rows = tiles + from * kTile;
      Lanes<double> sums[kRowsAtOnce] = {}, mirrored[kRowsAtOnce];
      for (std::int64_t r = 0; r < kRowsAtOnce; ++r) mirrored[r] = all_lanes(own_x[r]);
      for (std::int64_t j = 0; j < i; ++j) {
        fetch_ahead<kRowsAtOnce * kTile>(rows + j * kTileSize, kAhead);
        for (std::int64_t k = 0; k < kTile; k += kWidth) {
          const Lanes<double> other_x = load_lanes(x + j * kTile + k);
          Lanes<double> other_y = load_lanes(y + j * kTile + k);
          for (std::int64_t r = 0; r < kRowsAtOnce; ++r) {
            const Lanes<double> row = load_lanes(rows + j * kTileSize + r * kTile + k);
            sums[r] = mul_add_lanes(row, other_x, sums[r]);
            other_y = mul_add_lanes(row, mirrored[r], other_y);
          }
          store_lanes(y + j * kTile + k, other_y);
        }
      }
      for (std::int64_t k = 0; k < kTile; k += kWidth) {
        const Lanes<double> other_x = load_lanes(x + i * kTile + k);
        for (std::int64_t r = 0; r < kRowsAtOnce; ++r) {
          const Lanes<double> row = load_lanes(rows + i * kTileSize + r * kTile + k);
          sums[r] = mul_add_lanes(row, other_x, sums[r]);
        }
      }
      for (std::int64_t r = 0; r < kRowsAtOnce; ++r) {
        y[i * kTile + from + r] += sum_of_lanes(sums[r]);
      }
    }
  }
}

// The rows of tiles [first, last) of M = scale (M + the terms): `vectors` holds s and w of each,
// row by row, `stride` apart.
void matrix_take_in(double* matrix, std::int64_t first, std::int64_t last, double scale,
                    const double* vectors, std::int64_t stride, const double* terms,
                    std::int64_t count) {
  constexpr std::int64_t kWidth = kLanes<double>;
  for (std::int64_t i = first; i < last; ++i) {
    double* tiles = matrix + tiles_before(i) * kTileSize;
    for (std::int64_t from = 0; from < kTile; from += kRowsAtOnce) {
      // [s w] A of these rows.
      double left[2 * kMostTerms][kRowsAtOnce];
      for (std::int64_t t = 0; t < count; ++t) {
        const double *s = vectors + 2 * t * stride, *w = s + stride, *a = terms + t * kTermSize;
        for (std::int64_t r = 0; r < kRowsAtOnce; ++r) {
          const std::int64_t row = i * kTile + from + r;
          left[2 * t][r] = a[0] * s[row] + a[1] * w[row];
          left[2 * t + 1][r] = a[1] * s[row] + a[2] * w[row];
        }
      }
      for (std::int64_t j = 0; j <= i; ++j) {
        for (std::int64_t k = 0; k < kTile; k += kWidth) {
          double* rows = tiles + j * kTileSize + from * kTile + k;
          Lanes<double> sums[kRowsAtOnce];
          for (std::int64_t r = 0; r < kRowsAtOnce; ++r) sums[r] = load_lanes(rows + r * kTile);
          for (std::int64_t q = 0; q < 2 * count; ++q) {
            const Lanes<double> vector = load_lanes(vectors + q * stride + j * kTile + k);
            for (std::int64_t r = 0; r < kRowsAtOnce; ++r) {
              sums[r] = mul_add_lanes(all_lanes(left[q][r]), vector, sums[r]);
            }
          }
          for (std::int64_t r = 0; r < kRowsAtOnce; ++r) {
            store_lanes(rows + r * kTile, sums[r] * scale);
          }
        }
      }
    }
    // What rounding makes of a tile and its mirror image differs, and no pair would ever take that
    // away: each would divide it by tau.
    double* diagonal = tiles + i * kTileSize;
    for (std::int64_t r = 0; r < kTile; ++r) {
      for (std::int64_t c = 0; c < r; ++c) diagonal[c * kTile + r] = diagonal[r * kTile + c];
    }
  }
}

// out[q] = vectors[q] . x
void vector_dots(const double* vectors, std::int64_t stride, std::int64_t count,
                 std::int64_t length, const double* x, double* out) {
  constexpr std::int64_t kWidth = kLanes<double>, kChains = 4;
  for (std::int64_t q = 0; q < count; ++q) {
    const double* vector = vectors + q * stride;
    Lanes<double> sums[kChains] = {};
    std::int64_t i = 0;
    for (; i + kChains * kWidth <= length; i += kChains * kWidth) {
      for (std::int64_t c = 0; c < kChains; ++c) {
        sums[c] = mul_add_lanes(load_lanes(vector + i + c * kWidth), load_lanes(x + i + c * kWidth),
                                sums[c]);
      }
    }
    for (; i < length; i += kWidth) {  // a whole number of tiles
      sums[0] = mul_add_lanes(load_lanes(vector + i), load_lanes(x + i), sums[0]);
    }
    out[q] = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// y += sum of coefs[q] vectors[q]
void vector_sum(const double* vectors, std::int64_t stride, std::int64_t count, std::int64_t length,
                const double* coefs, double* y) {
  constexpr std::int64_t kWidth = kLanes<double>;
  for (std::int64_t i = 0; i < length; i += kWidth) {
    Lanes<double> sum = load_lanes(y + i);
    for (std::int64_t q = 0; q < count; ++q) {
      sum = mul_add_lanes(all_lanes(coefs[q]), load_lanes(vectors + q * stride + i), sum);
    }
    store_lanes(y + i, sum);
  }
}

}  // namespace
}  // namespace fuse_ext
