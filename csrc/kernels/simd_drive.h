// SPDX-License-Identifier: Apache-2.0
// Cuts a product into tiles of rows and vectors. A tile is a class with
//
//     kWideRows, kVectors              its largest number of rows and of vectors where there are several vectors
//     kInputBytes                      of kBlock columns of one vector
//     kTall                            whether rows share one vector, as work takes longer than bytes
//     kFetches                         whether rows in order are fetched ahead, as weights are
//     Input<N>(w, x, v)                vectors v to v + N of x, made ready once for many rows
//     run<R, N>(w, rows, fetch, input, out, stride)    out[n * stride + r] = <row r, vector n of input>
//
// which gives an element the same bits in a tile of any size. `fetch` is told how many bytes of each row are in work,
// and fetches as many of later rows into the cache.
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

  Rows(const Matrix& w, const int32_t* list) {
    for (int r = 0; r < R; ++r) values[r] = w.values + list[r] * w.row_bytes;
  }
  Rows(const Matrix& w, int64_t first) {
    for (int r = 0; r < R; ++r) values[r] = w.values + (first + r) * w.row_bytes;
  }
};

// One vector meets rows one after the other: memory serves one stream faster than several, however short the rows. So
// do the first of few vectors where rows are long: those after them find the rows in the cache. But a vector that the
// first-level cache does not hold beside the rows comes from the second-level one for each row, so rows share it.
inline constexpr int kTallRows = 4;                     // of other tiles
inline constexpr int64_t kFirstLevelBytes = 30 * 1024;  // of a vector that the first-level cache holds
inline constexpr int64_t kLongRow = 1024;               // bytes
inline constexpr int64_t kBlockBytes = 640 * 1024;      // rows that stay in the second-level cache over all vectors

// GCC would read a vector from memory again for each of its uses, which costs more than the use.
template <class I>
static TS_INLINE inline void keep_in_register(I& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// Rows in order that need none.
struct NoFetch {
  void operator()(int64_t) const {}
};

// Into the second-level cache: more reads can be under way to it than to the first one, which sums and the rows in work
// fill already. Always inline: GCC takes a function that only prefetches for one without effect and leaves out calls.
static TS_INLINE inline void prefetch(const std::byte* p) { __builtin_prefetch(p, 0, 2); }

// Rows of a list it does not foresee. These are fetched while others are in work, and row by row: the rows in work, of
// which S::kListRows are read side by side, the more the better until the registers are full.
template <class S, int R>
class FetchRows {
 public:
  FetchRows(const Rows<R>& rows, int64_t bytes) : rows_(rows), bytes_(bytes) {}

  // `bytes` of each row are in work now; fetch as many.
  TS_INLINE void operator()(int64_t bytes) {
    for (due_ += R * bytes; due_ > 0 && row_ < R; due_ -= 64) {
      prefetch(rows_.values[row_] + byte_);
      byte_ += 64;
      if (byte_ >= bytes_) byte_ = 0, ++row_;
    }
  }

 private:
  Rows<R> rows_;
  int64_t bytes_, byte_ = 0, due_ = 0;
  int row_ = 0;
};

// Weights in order, which come from memory: a core keeps more reads under way than the processor foresees. One line a
// load; where a load with its scales is more than a line, the processor's own prefetching has the few that are left
// out. What lies behind the last row is asked for in vain.
template <class S, int R>
class FetchAhead {
 public:
  explicit FetchAhead(const Rows<R>& rows) : rows_(rows) {}

  TS_INLINE void operator()(int64_t bytes) {
    TS_UNROLL for (int r = 0; r < R; ++r) prefetch(rows_.values[r] + byte_);
    byte_ += bytes;
  }

 private:
  static constexpr int64_t kDistance = 8192;

  Rows<R> rows_;
  int64_t byte_ = kDistance;
};

// Which listed rows to fetch, of each `bytes` from `first` on.
template <class S>
class Lookahead {
 public:
  Lookahead(const Matrix& w, const int32_t* rows, int64_t n, int64_t first, int64_t bytes)
      : w_(w), rows_(rows), n_(n), bytes_(bytes) {
    w_.values += first;
    for (int64_t i = 0; i < kDistance && i < n; ++i) {
      for (int64_t byte = 0; byte < bytes; byte += 64) prefetch(w_.values + rows[i] * w_.row_bytes + byte);
    }
  }

  // Those for while the R rows from place i on are in work; at the end of the list its last row again.
  template <int R>
  FetchRows<S, R> after(int64_t i) const {
    int32_t list[R];
    for (int r = 0; r < R; ++r) list[r] = rows_[i + kDistance + r < n_ ? i + kDistance + r : n_ - 1];
    return {Rows<R>(w_, list), bytes_};
  }

 private:
  static constexpr int64_t kDistance = 8;  // covers the memory's latency

  Matrix w_;
  const int32_t* rows_;
  int64_t n_, bytes_;
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

// Rows [first, last) times the N vectors of `input`, R rows at a time.
template <class Tile, int R, int N>
static void dot_rows(const Matrix& w, int64_t first, int64_t last, const typename Tile::template Input<N>& input,
                     float* out, int64_t stride) {
  int64_t row = first;
  for (; row + R <= last; row += R) {
    const Rows<R> now(w, row);
    if constexpr (Tile::kFetches && (R == 1 || N == 1)) {  // else the work takes longer than the memory
      Tile::template run<R, N>(w, now, FetchAhead<Tile, R>(now), input, out + row, stride);
    } else {
      Tile::template run<R, N>(w, now, NoFetch{}, input, out + row, stride);
    }
  }
  if constexpr (R > 1) dot_rows<Tile, 1, N>(w, row, last, input, out, stride);
}

// Rows [first, last) times N vectors from v on.
template <class Tile, int N>
static void dot_vectors(const Matrix& w, int64_t first, int64_t last, const Vectors& x, int64_t v, float* out,
                        int64_t stride) {
  const typename Tile::template Input<N> input(w, x, v);
  out += v * stride;
  if constexpr (N > 1) {
    if (v == 0 && x.count <= 2 * Tile::kVectors && w.row_bytes > kLongRow) {
      dot_rows<Tile, 1, N>(w, first, last, input, out, stride);
      return;
    }
  }
  if constexpr (N == 1) {
    if (!Tile::kTall && w.cols / kBlock * Tile::kInputBytes <= kFirstLevelBytes) {
      dot_rows<Tile, 1, N>(w, first, last, input, out, stride);
    } else {
      dot_rows<Tile, kTallRows, N>(w, first, last, input, out, stride);
    }
  } else {
    dot_rows<Tile, Tile::kWideRows, N>(w, first, last, input, out, stride);
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
  if constexpr (Tile::kVectors > 3) {
    if (x.count == 3 && w.row_bytes > kLongRow) {
      dot_vectors<Tile, 3>(w, first, last, x, 0, out, stride);
      return;
    }
  }
  const int64_t fit = kBlockBytes / w.row_bytes / kTallRows * kTallRows;
  const int64_t step = fit > kTallRows ? fit : kTallRows;
  for (int64_t row = first; row < last; row += step) {
    dot_tail<Tile, Tile::kVectors>(w, row, row + step < last ? row + step : last, x, 0, out, stride);
  }
}

// Listed rows from place i on, R at a time and then fewer.
template <class S, class Tile, int R>
static void dot_list_rows(const Matrix& w, const int32_t* rows, int64_t i, int64_t n, const Lookahead<S>& ahead,
                          const typename Tile::template Input<1>& input, float* out) {
  for (; i + R <= n; i += R) {
    Tile::template run<R, 1>(w, Rows<R>(w, rows + i), ahead.template after<R>(i), input, out + i, 0);
  }
  if constexpr (R > 1) dot_list_rows<S, Tile, (R > 4 ? 4 : 1)>(w, rows, i, n, ahead, input, out);
}

template <class S, class Tile>
static void dot_list(const Matrix& w, const int32_t* rows, int64_t n, const Vectors& x, int64_t v, float* out) {
  if (n == 0) return;
  const typename Tile::template Input<1> input(w, x, v);
  dot_list_rows<S, Tile, S::kListRows>(w, rows, 0, n, Lookahead<S>(w, rows, n, 0, w.row_bytes), input, out);
}

}  // namespace turbosparse
