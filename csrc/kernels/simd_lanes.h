// SPDX-License-Identifier: Apache-2.0
// How an instruction set S with L lanes walks the groups of a blocked row (pack.h), and the two operations that need
// single weights: decoding a group, and axpy.
//
// Weights leave their dwords in *lane order*: weight k of a dword (nibble k, or byte k) of all dwords, then weight k
// + 1. In that order a lane belongs to one block, so the scales of 16 blocks multiply as they lie. axpy keeps y in lane
// order over all its rows and turns it back at the end.
#pragma once

#include <cstring>
#include <utility>

#include "simd_drive.h"

namespace turbosparse {

template <int G>
struct Size {};

// Calls visit(Size<G>, first block) for each group of blocks [block, end); `block` begins a group of 16.
template <class Visit>
static TS_INLINE inline void for_groups(int64_t block, int64_t end, Visit visit) {
  for (; block + 16 <= end; block += 16) visit(Size<16>{}, block);
  if ((end - block) & 8) visit(Size<8>{}, block), block += 8;
  if ((end - block) & 4) visit(Size<4>{}, block), block += 4;
  if ((end - block) & 2) visit(Size<2>{}, block), block += 2;
  if ((end - block) & 1) visit(Size<1>{}, block);
}

// A group of at least L blocks is read in parts of L blocks, dword by dword; a smaller one as a flat run of dwords,
// whose lanes l belong to block l % G.
template <class S, WeightType kType, int G>
struct Group {
  static constexpr int kLanes = S::kLanes;
  static constexpr int kDwords = static_cast<int>(block_bytes(kType)) / 4;  // of one block
  static constexpr int kWeights = static_cast<int>(kBlock) / kDwords;       // in one dword
  static constexpr bool kFlat = G < kLanes;
  static constexpr int kParts = kFlat ? 1 : G / kLanes;
  static constexpr int kWidth = kFlat && kDwords * G < kLanes ? kDwords * G : kLanes;  // dwords of one load
  static constexpr int kLoads = kFlat ? kDwords * G / kWidth : kDwords;
  static constexpr int kStep = kFlat ? kWidth : G;  // dwords from one load to the next
  static constexpr int kScales = kFlat ? G : kLanes;

  static TS_INLINE typename S::I load(const std::byte* row, int64_t block, int part, int i) {
    return S::template load_bytes<4 * kWidth>(row + block * block_bytes(kType) + 4 * (part * kLanes + i * kStep));
  }
  static TS_INLINE typename S::F scales(const std::byte* row_scales, int64_t block, int part) {
    return S::template repeat_f16<kScales>(row_scales + 2 * (block + part * kLanes));
  }
  // Where weight k of load i lies in lane order.
  static constexpr int lane(int part, int i, int k) { return k * kDwords * G + i * kStep + part * kLanes; }

  // Weight kIndex of each dword of load i.
  template <int kIndex>
  static TS_INLINE typename S::F weight(const std::byte* row, int64_t block, int part, int i) {
    const std::byte* dwords = row + block * block_bytes(kType) + 4 * (part * kLanes + i * kStep);
    if constexpr (kType == WeightType::q4_0) return S::template nibble<kIndex, 4 * kWidth>(dwords);
    if constexpr (kType == WeightType::q8_0) return S::template byte<kIndex, 4 * kWidth>(dwords);
  }

  // Where column c of the group's first block lies in lane order.
  static constexpr int column(int c) {
    if (kType == WeightType::q4_0) return (c % 4 * 2 + c / 16) * kDwords * G + c % 16 / 4 * G;
    return c % 4 * kDwords * G + c / 4 * G;
  }
};

// One group of columns into lane order, and back.
template <class S, WeightType kType, int G>
static void to_lanes(const float* columns, float* lanes) {
  using Shape = Group<S, kType, G>;
  if constexpr (Shape::kFlat) {
    for (int b = 0; b < G; ++b) {
      for (int c = 0; c < kBlock; ++c) lanes[Shape::column(c) + b] = columns[b * kBlock + c];
    }
    return;
  }
  constexpr int L = S::kLanes;
  for (int b = 0; b < G; b += L) {
    for (int c = 0; c < kBlock; c += L) {
      typename S::F square[L];
      TS_UNROLL for (int i = 0; i < L; ++i) square[i] = S::load(columns + (b + i) * kBlock + c);
      S::transpose(square);
      TS_UNROLL for (int i = 0; i < L; ++i) S::store(lanes + Shape::column(c + i) + b, square[i]);
    }
  }
}

template <class S, WeightType kType, int G>
static void from_lanes(const float* lanes, float* columns) {
  using Shape = Group<S, kType, G>;
  if constexpr (Shape::kFlat) {
    for (int b = 0; b < G; ++b) {
      for (int c = 0; c < kBlock; ++c) columns[b * kBlock + c] = lanes[Shape::column(c) + b];
    }
    return;
  }
  constexpr int L = S::kLanes;
  for (int b = 0; b < G; b += L) {
    for (int c = 0; c < kBlock; c += L) {
      typename S::F square[L];
      TS_UNROLL for (int i = 0; i < L; ++i) square[i] = S::load(lanes + Shape::column(c + i) + b);
      S::transpose(square);
      TS_UNROLL for (int i = 0; i < L; ++i) S::store(columns + (b + i) * kBlock + c, square[i]);
    }
  }
}

// The group at `block` of a row, as its type says: [G * 32] columns.
template <class S, WeightType kType, int G>
static void decode_group(const std::byte* values, const std::byte* scales, int64_t block, float* out) {
  using Shape = Group<S, kType, G>;
  alignas(64) float lanes[G * kBlock];
  for (int part = 0; part < Shape::kParts; ++part) {
    const auto scale = Shape::scales(scales, block, part);
    for (int i = 0; i < Shape::kLoads; ++i) {
      [&]<int... k>(std::integer_sequence<int, k...>) {
        (S::template store_first<Shape::kWidth>(lanes + Shape::lane(part, i, k),
                                                S::mul(scale, Shape::template weight<k>(values, block, part, i))),
         ...);
      }(std::make_integer_sequence<int, Shape::kWeights>{});
    }
  }
  from_lanes<S, kType, G>(lanes, out);
}

// lanes += coefficient[r] * (group at `block` of row r), for r in order.
template <class S, WeightType kType, int G, int R>
static TS_INLINE inline void axpy_group(const Rows<R>& rows, const float* coefficient, int64_t block, float* lanes) {
  using Shape = Group<S, kType, G>;
  TS_UNROLL for (int part = 0; part < Shape::kParts; ++part) {
    typename S::F factor[R];
    TS_UNROLL for (int r = 0; r < R; ++r) {
      factor[r] = S::mul(S::set(coefficient[r]), Shape::scales(rows.scales[r], block, part));
    }
    for (int i = 0; i < Shape::kLoads; ++i) {
      const auto add = [&]<int k>(std::integral_constant<int, k>) TS_INLINE {
        float* at = lanes + Shape::lane(part, i, k);
        auto sum = S::template load_first<Shape::kWidth>(at);
        TS_UNROLL for (int r = 0; r < R; ++r) {
          sum = S::fma(factor[r], Shape::template weight<k>(rows.values[r], block, part, i), sum);
        }
        S::template store_first<Shape::kWidth>(at, sum);
      };
      [&]<int... k>(std::integer_sequence<int, k...>) TS_INLINE {
        (add(std::integral_constant<int, k>{}), ...);
      }(std::make_integer_sequence<int, Shape::kWeights>{});
    }
  }
}

inline constexpr int64_t kTileBlocks = 128;  // y of 4096 columns stays in the first-level cache over all rows

// Columns of blocks [first, last) of R rows; `ahead` are the rows to fetch meanwhile.
template <class S, WeightType kType, int R>
static void axpy_rows(const Rows<R>& rows, const Rows<R>& ahead, const float* coefficient, int64_t first, int64_t last,
                      float* lanes) {
  for_groups(first, last, [&]<int G>(Size<G>, int64_t block) {
    TS_UNROLL for (int r = 0; r < R; ++r) {
      for (int64_t byte = 0; byte < G * block_bytes(kType); byte += 64) {
        S::prefetch(ahead.values[r] + block * block_bytes(kType) + byte);
      }
    }
    axpy_group<S, kType, G, R>(rows, coefficient, block, lanes + (block - first) * kBlock);
  });
}

// Whether all bits of y are zero: then it is zero in lane order too, and need not be turned.
template <class S>
static bool all_zero(const float* y, int64_t n) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t word;
    __builtin_memcpy(&word, y + i, 4);
    bits |= word;
  }
  return bits == 0;
}

template <class S, WeightType kType>
static void block_axpy_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, float* y) {
  constexpr int kRows = kTallRows;
  alignas(64) float lanes[kTileBlocks * kBlock];
  const int64_t blocks = w.cols / kBlock;
  if (n == 0) return;
  for (int64_t first = 0; first < blocks; first += kTileBlocks) {
    const int64_t last = first + kTileBlocks < blocks ? first + kTileBlocks : blocks;
    float* columns = y + first * kBlock;
    if (all_zero<S>(columns, (last - first) * kBlock)) {
      __builtin_memset(lanes, 0, static_cast<size_t>((last - first) * kBlock) * sizeof(float));
    } else {
      for_groups(first, last, [&]<int G>(Size<G>, int64_t block) {
        to_lanes<S, kType, G>(y + block * kBlock, lanes + (block - first) * kBlock);
      });
    }
    const Lookahead<S> ahead(w, rows, n);
    int64_t i = 0;
    for (; i + kRows <= n; i += kRows) {
      axpy_rows<S, kType, kRows>(Rows<kRows>(w, rows + i), ahead.after(i), coefficient + i, first, last, lanes);
    }
    for (; i < n; ++i) {
      const Rows<1> row(w, rows + i);
      axpy_rows<S, kType, 1>(row, row, coefficient + i, first, last, lanes);
    }
    for_groups(first, last, [&]<int G>(Size<G>, int64_t block) {
      from_lanes<S, kType, G>(lanes + (block - first) * kBlock, y + block * kBlock);
    });
  }
}

template <class S, WeightType kType>
static void block_decode(const Matrix& w, int64_t row, float* out) {
  const Rows<1> one(w, row);
  for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
    decode_group<S, kType, G>(one.values[0], one.scales[0], block, out + block * kBlock);
  });
}

}  // namespace turbosparse
