// SPDX-License-Identifier: Apache-2.0
// Dot products and axpy of unblocked rows (f32, f16, bf16), in the words of an instruction set S.
//
// S lives in an anonymous namespace, so everything that is instantiated with it has internal linkage.
#pragma once

#include "simd_drive.h"

namespace turbosparse {

template <class S, WeightType kType>
struct PlainRow {
  using F = typename S::F;
  static constexpr int64_t kBytes = kType == WeightType::f32 ? 4 : 2;

  static F load(const std::byte* row, int64_t c) {
    if constexpr (kType == WeightType::f32) return S::load(reinterpret_cast<const float*>(row) + c);
    if constexpr (kType == WeightType::f16) return S::load_f16(reinterpret_cast<const uint16_t*>(row) + c);
    return S::load_bf16(reinterpret_cast<const uint16_t*>(row) + c);
  }
  static F load(const std::byte* row, int64_t c, int64_t n) {
    if constexpr (kType == WeightType::f32) return S::load(reinterpret_cast<const float*>(row) + c, n);
    if constexpr (kType == WeightType::f16) return S::load_f16(reinterpret_cast<const uint16_t*>(row) + c, n);
    return S::load_bf16(reinterpret_cast<const uint16_t*>(row) + c, n);
  }
};

// One accumulator a (row, vector): a lane sums every kLanes-th column.
template <class S, WeightType kType>
struct PlainDot {
  using F = typename S::F;
  using Row = PlainRow<S, kType>;
  static constexpr int kWideRows = 4;
  static constexpr int kVectors = 4;
  static constexpr int64_t kInputBytes = 4 * kBlock;
  static constexpr bool kTall = false, kFetches = false;

  template <int N>
  using Input = FloatVectors<N>;

  template <int R, int N, class Fetch>
  static void run(const Matrix& w, const Rows<R>& rows, Fetch fetch, const Input<N>& input, float* out,
                  int64_t stride) {
    F total[R][N];
    for (auto& row : total) {
      for (F& sum : row) sum = S::zero();
    }
    const float* vectors = input.x;
    int64_t c = 0;
    for (; c + S::kLanes <= w.cols; c += S::kLanes) {
      fetch(S::kLanes * Row::kBytes);
      for (int r = 0; r < R; ++r) {
        const F weights = Row::load(rows.values[r], c);
        for (int n = 0; n < N; ++n) total[r][n] = S::fma(weights, S::load(vectors + n * w.cols + c), total[r][n]);
      }
    }
    if (c < w.cols) {
      const int64_t left = w.cols - c;
      for (int r = 0; r < R; ++r) {
        const F weights = Row::load(rows.values[r], c, left);
        for (int n = 0; n < N; ++n) {
          total[r][n] = S::fma(weights, S::load(vectors + n * w.cols + c, left), total[r][n]);
        }
      }
    }
    store_sums<S, R, N>(total, out, stride);
  }
};

// y += coefficient[r] * row r, for r in order, with a vector of y in a register over the R rows.
template <class S, WeightType kType, int R>
static void plain_axpy(const Rows<R>& rows, const float* coefficient, int64_t cols, float* y) {
  using Row = PlainRow<S, kType>;
  typename S::F factor[R];
  for (int r = 0; r < R; ++r) factor[r] = S::set(coefficient[r]);
  int64_t c = 0;
  for (; c + S::kLanes <= cols; c += S::kLanes) {
    auto sum = S::load(y + c);
    for (int r = 0; r < R; ++r) sum = S::fma(factor[r], Row::load(rows.values[r], c), sum);
    S::store(y + c, sum);
  }
  if (c == cols) return;
  const int64_t left = cols - c;
  auto sum = S::load(y + c, left);
  for (int r = 0; r < R; ++r) sum = S::fma(factor[r], Row::load(rows.values[r], c, left), sum);
  S::store(y + c, sum, left);
}

// y += coefficient[i] * row rows[i] for rows of at most V vectors, which y spends in registers: values of an attention
// head, of which there are many and short ones.
template <class S, WeightType kType, int V>
static void short_axpy_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, float* y) {
  using Row = PlainRow<S, kType>;
  typename S::F sum[V];
  for (int v = 0; v < V; ++v) sum[v] = S::load(y + v * S::kLanes);
  for (int64_t i = 0; i < n; ++i) {
    const std::byte* row = w.values + rows[i] * w.row_bytes;
    const auto factor = S::set(coefficient[i]);
    for (int v = 0; v < V; ++v) sum[v] = S::fma(factor, Row::load(row, v * S::kLanes), sum[v]);
  }
  for (int v = 0; v < V; ++v) S::store(y + v * S::kLanes, sum[v]);
}

template <class S, WeightType kType>
static void plain_axpy_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, float* y) {
  if (w.cols == 4 * S::kLanes) return short_axpy_listed<S, kType, 4>(w, rows, coefficient, n, y);
  if (w.cols == 8 * S::kLanes) return short_axpy_listed<S, kType, 8>(w, rows, coefficient, n, y);
  constexpr int kRows = 4;
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) plain_axpy<S, kType, kRows>(Rows<kRows>(w, rows + i), coefficient + i, w.cols, y);
  for (; i < n; ++i) plain_axpy<S, kType, 1>(Rows<1>(w, rows + i), coefficient + i, w.cols, y);
}

template <class S, WeightType kType>
static void plain_decode(const Matrix& w, int64_t row, float* out) {
  using Row = PlainRow<S, kType>;
  const std::byte* values = w.values + row * w.row_bytes;
  int64_t c = 0;
  for (; c + S::kLanes <= w.cols; c += S::kLanes) S::store(out + c, Row::load(values, c));
  if (c < w.cols) S::store(out + c, Row::load(values, c, w.cols - c), w.cols - c);
}

}  // namespace turbosparse
