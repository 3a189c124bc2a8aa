// SPDX-License-Identifier: Apache-2.0
// Cuts a product into tiles of rows and vectors. A tile is a class with
//
//     kVectors, kWideRows                  its largest number of vectors, and of rows beside more than one vector
//     run<R, N>(w, rows, ahead, x, v, out, stride)     out[n * stride + r] = <row r, vector v + n>
//
// which gives an element the same bits in a tile of any size. One vector meets four rows at once (they share its loads
// and hide each other's latency); `ahead` are the rows to fetch into the cache meanwhile.
#pragma once

#include "pack.h"

namespace turbosparse {

template <int R>
struct Rows {
  const std::byte* values[R];
  const std::byte* scales[R];

  Rows(const Matrix& w, const int32_t* list) {
    for (int r = 0; r < R; ++r) set(w, r, list[r]);
  }
  Rows(const Matrix& w, int64_t first) {
    for (int r = 0; r < R; ++r) set(w, r, first + r);
  }

 private:
  void set(const Matrix& w, int r, int64_t row) {
    values[r] = w.values + row * w.value_stride;
    scales[r] = w.scales + row * w.scale_stride;
  }
};

inline constexpr int kTallRows = 4;
inline constexpr int64_t kBlockBytes = 256 * 1024;  // rows that stay in the second-level cache over all vectors

// Rows [first, last) times N vectors from v on.
template <class Tile, int N>
static void dot_vectors(const Matrix& w, int64_t first, int64_t last, const Vectors& x, int64_t v, float* out,
                        int64_t stride) {
  constexpr int kRows = N == 1 ? kTallRows : Tile::kWideRows;
  int64_t row = first;
  for (; row + kRows <= last; row += kRows) {
    const int64_t next = row + 2 * kRows <= last ? row + kRows : row;
    Tile::template run<kRows, N>(w, Rows<kRows>(w, row), Rows<kRows>(w, next), x, v, out + v * stride + row, stride);
  }
  for (; row < last; ++row) {
    const Rows<1> rows(w, row);
    Tile::template run<1, N>(w, rows, rows, x, v, out + v * stride + row, stride);
  }
}

template <class Tile, int N>
static void dot_tail(const Matrix& w, int64_t first, int64_t last, const Vectors& x, int64_t v, float* out,
                     int64_t stride) {
  for (; v + N <= x.count; v += N) dot_vectors<Tile, N>(w, first, last, x, v, out, stride);
  if constexpr (N > 1) {
    if (v < x.count) dot_tail<Tile, N / 2>(w, first, last, x, v, out, stride);
  }
}

template <class Tile>
static void dot_range(const Matrix& w, int64_t first, int64_t last, const Vectors& x, float* out, int64_t stride) {
  if (x.count == 1) {
    dot_vectors<Tile, 1>(w, first, last, x, 0, out, stride);
    return;
  }
  const int64_t fit = kBlockBytes / w.row_bytes() / kTallRows * kTallRows;
  const int64_t step = fit > kTallRows ? fit : kTallRows;
  for (int64_t row = first; row < last; row += step) {
    dot_tail<Tile, Tile::kVectors>(w, row, row + step < last ? row + step : last, x, 0, out, stride);
  }
}

template <class Tile>
static void dot_list(const Matrix& w, const int32_t* rows, int64_t n, const Vectors& x, int64_t v, float* out) {
  int64_t i = 0;
  for (; i + kTallRows <= n; i += kTallRows) {
    const Rows<kTallRows> now(w, rows + i);
    const Rows<kTallRows> next(w, i + 2 * kTallRows <= n ? rows + i + kTallRows : rows + i);
    Tile::template run<kTallRows, 1>(w, now, next, x, v, out + i, 0);
  }
  for (; i < n; ++i) {
    const Rows<1> now(w, rows + i);
    Tile::template run<1, 1>(w, now, now, x, v, out + i, 0);
  }
}

}  // namespace turbosparse
