// SPDX-License-Identifier: Apache-2.0
// Cuts a product into tiles of rows and vectors. A tile is a class with
//
//     kVectors, kWideRows              its largest number of vectors, and of rows beside more than one vector
//     Input<N>(w, x, v)                vectors v to v + N of x, made ready once for many rows
//     run<R, N>(w, rows, ahead, input, out, stride)    out[n * stride + r] = <row r, vector n of input>
//
// which gives an element the same bits in a tile of any size. One vector meets four rows at once (they share its loads
// and hide each other's latency); `ahead` are the rows to fetch into the cache meanwhile.
#pragma once

#include "pack.h"

#define TS_INLINE __attribute__((always_inline))
#if defined(__clang__)
#define TS_UNROLL _Pragma("unroll")
#else
#define TS_UNROLL _Pragma("GCC unroll 16")
#endif

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
inline constexpr int64_t kAheadBytes = 4096;        // how far ahead of a range's rows the cache is filled
inline constexpr int64_t kBlockBytes = 256 * 1024;  // rows that stay in the second-level cache over all vectors

// Which listed rows to fetch into the cache while others are in work: those some kilobytes further down the list, which
// covers the memory's latency. The processor's own prefetcher does not foresee a list.
template <class S>
class Lookahead {
 public:
  Lookahead(const Matrix& w, const int32_t* rows, int64_t n) : w_(w), rows_(rows), n_(n) {
    const int64_t fit = kBytes / w.row_bytes() / kTallRows * kTallRows;
    distance_ = fit > kTallRows ? fit : kTallRows;
    for (int64_t i = 0; i < distance_ && i < n; ++i) {
      fetch(w.values + rows[i] * w.value_stride, w.value_stride);
      fetch_scales(i);
    }
  }

  // The rows to fetch during the four from place i on. Their scales are requested at once; their values are left to the
  // caller, who spreads them over its work, since a core waits for no more than some ten lines at a time.
  Rows<kTallRows> after(int64_t i) const {
    const int64_t next = i + distance_ + kTallRows <= n_ ? i + distance_ : i;
    if (next != i) {
      for (int r = 0; r < kTallRows; ++r) fetch_scales(next + r);
    }
    return Rows<kTallRows>(w_, rows_ + next);
  }

 private:
  static constexpr int64_t kBytes = 4096;

  static void fetch(const std::byte* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) S::prefetch(from + i);
  }
  void fetch_scales(int64_t i) const { fetch(w_.scales + rows_[i] * w_.scale_stride, w_.scale_stride); }

  const Matrix& w_;
  const int32_t* rows_;
  int64_t n_;
  int64_t distance_;
};

// N fp32 vectors, read where they are.
template <int N>
struct FloatVectors {
  const float* x;
  int64_t cols;

  FloatVectors(const Matrix& w, const Vectors& vectors, int64_t v) : x(vectors.x + v * w.cols), cols(w.cols) {}
};

// out[n * stride + r] = the sum of the lanes of total[r][n].
template <class S, int R, int N>
static TS_INLINE inline void store_sums(const typename S::F (&total)[R][N], float* out, int64_t stride) {
  if constexpr (R * N % 4 == 0) {
    TS_UNROLL for (int first = 0; first < R * N; first += 4) {
      float sums[4];
      S::sum4(&total[0][0] + first, sums);
      TS_UNROLL for (int i = 0; i < 4; ++i) out[(first + i) % N * stride + (first + i) / N] = sums[i];
    }
  } else {
    TS_UNROLL for (int r = 0; r < R; ++r) {
      TS_UNROLL for (int n = 0; n < N; ++n) out[n * stride + r] = S::sum(total[r][n]);
    }
  }
}

// Rows [first, last) times N vectors from v on.
template <class Tile, int N>
static void dot_vectors(const Matrix& w, int64_t first, int64_t last, const Vectors& x, int64_t v, float* out,
                        int64_t stride) {
  constexpr int kRows = N == 1 ? kTallRows : Tile::kWideRows;
  const typename Tile::template Input<N> input(w, x, v);
  const int64_t distance = kRows + kAheadBytes / w.row_bytes();
  int64_t row = first;
  for (; row + kRows <= last; row += kRows) {
    const int64_t far = row + distance;
    const int64_t next = far + kRows <= last ? far : row;
    Tile::template run<kRows, N>(w, Rows<kRows>(w, row), Rows<kRows>(w, next), input, out + v * stride + row, stride);
  }
  for (; row < last; ++row) {
    const Rows<1> rows(w, row);
    Tile::template run<1, N>(w, rows, rows, input, out + v * stride + row, stride);
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
  const typename Tile::template Input<1> input(w, x, v);
  int64_t i = 0;
  for (; i + kTallRows <= n; i += kTallRows) {
    const Rows<kTallRows> now(w, rows + i);
    const Rows<kTallRows> next(w, i + 2 * kTallRows <= n ? rows + i + kTallRows : rows + i);
    Tile::template run<kTallRows, 1>(w, now, next, input, out + i, 0);
  }
  for (; i < n; ++i) {
    const Rows<1> now(w, rows + i);
    Tile::template run<1, 1>(w, now, now, input, out + i, 0);
  }
}

}  // namespace turbosparse
