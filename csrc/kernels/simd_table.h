// SPDX-License-Identifier: Apache-2.0
// The table of an instruction set S, made of the templates of simd_*.h: one switch a call chooses the weight type.
#pragma once

#include "simd_blocks.h"
#include "simd_math.h"
#include "simd_plain.h"
#include "simd_sums.h"
#include "simd_words.h"

namespace turbosparse {

// Calls f with the weight type as a constant.
template <class Call>
static void with_type(WeightType type, Call f) {
  switch (type) {
    case WeightType::f32:
      return f.template operator()<WeightType::f32>();
    case WeightType::f16:
      return f.template operator()<WeightType::f16>();
    case WeightType::bf16:
      return f.template operator()<WeightType::bf16>();
    case WeightType::q4_0:
      return f.template operator()<WeightType::q4_0>();
    case WeightType::q8_0:
      return f.template operator()<WeightType::q8_0>();
    case WeightType::ternary:
      return;  // multiplies int8 vectors only
  }
}

// Calls f with the tile that multiplies `w` with `x`.
template <class S, class Call>
static void with_tile(const Matrix& w, const Vectors& x, Call f) {
  if (w.type == WeightType::ternary) {
    if (x.rest) return f.template operator()<BlockDot<S, WeightType::ternary, 2>>();
    return f.template operator()<BlockDot<S, WeightType::ternary, 1>>();
  }
  with_type(w.type, [&]<WeightType kType>() {
    if constexpr (!is_blocked(kType)) {
      f.template operator()<PlainDot<S, kType>>();
    } else if (x.rest) {
      if constexpr (S::kJoinsTerms && kType == WeightType::q8_0) {
        f.template operator()<WordDot<S>>();
      } else {
        f.template operator()<BlockDot<S, kType, 2>>();
      }
    } else if (x.q) {
      f.template operator()<BlockDot<S, kType, 1>>();
    } else {
      f.template operator()<BlockDotF32<S, kType>>();
    }
  });
}

template <class S>
struct Table {
  static void dot(const Matrix& w, int64_t first, int64_t last, const Vectors& x, float* out, int64_t stride) {
    with_tile<S>(w, x, [&]<class Tile>() { dot_range<Tile>(w, first, last, x, out, stride); });
  }

  static void dot_listed(const Matrix& w, const int32_t* rows, int64_t n, const Vectors& x, int64_t v, float* out) {
    with_tile<S>(w, x, [&]<class Tile>() { dot_list<S, Tile>(w, rows, n, x, v, out); });
  }

  static void axpy_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, float* y) {
    with_type(w.type, [&]<WeightType kType>() {
      if constexpr (is_blocked(kType)) {
        block_axpy_listed<S, kType>(w, rows, coefficient, n, y);
      } else {
        plain_axpy_listed<S, kType>(w, rows, coefficient, n, y);
      }
    });
  }

  static void sum_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, int64_t most,
                         float* y) {
    if (w.type == WeightType::q4_0) return block_sum_listed<S, WeightType::q4_0>(w, rows, coefficient, n, most, y);
    block_sum_listed<S, WeightType::q8_0>(w, rows, coefficient, n, most, y);
  }

  static void sum_rows(const Matrix& w, int64_t first, int64_t last, const float* coefficient, int64_t stride,
                       int64_t count, float* y, int64_t y_stride) {
    const auto call =
        w.type == WeightType::q4_0 ? block_sum_rows<S, WeightType::q4_0> : block_sum_rows<S, WeightType::q8_0>;
    call(w, first, last, coefficient, stride, count, y, y_stride);
  }

  static void decode_row(const Matrix& w, int64_t row, float* out) {
    with_type(w.type, [&]<WeightType kType>() {
      if constexpr (is_blocked(kType)) {
        block_decode<S, kType>(w, row, out);
      } else {
        plain_decode<S, kType>(w, row, out);
      }
    });
  }
};

template <class S>
static constexpr Kernels simd_table() {
  return {
      .isa = S::kIsa,
      .packed_bytes = packed_bytes,
      .layout = layout,
      .pack = pack,
      .largest_scales = largest_scales,
      .quantize = quantize<S>,
      .dot = Table<S>::dot,
      .dot_listed = Table<S>::dot_listed,
      .axpy_listed = Table<S>::axpy_listed,
      .sum_listed = Table<S>::sum_listed,
      .sum_rows = Table<S>::sum_rows,
      .decode_row = Table<S>::decode_row,
      .positive = positive<S>,
      .to_f16 = to_f16<S>,
      .exp_sum = exp_sum<S>,
      .maximum = maximum<S>,
      .rms_norm = rms_norm<S>,
      .swiglu = swiglu<S>,
      .geglu = geglu<S>,
  };
}

}  // namespace turbosparse
