// SPDX-License-Identifier: Apache-2.0
// How an instruction set S with L lanes walks the groups of a blocked row (pack.h), and the two operations that need
// single weights: decoding a group, and axpy.
//
// Weights leave their dwords in *lane order*: weight k of a dword (nibble k, or byte k) of all dwords, then weight k
// + 1. In that order a lane belongs to one block, so the scales of 16 blocks multiply as they lie. axpy keeps y in lane
// order over all its rows and turns it back at the end.
//
// A weight becomes a float where it lies in its dword, as the last bits of a float of 2^23: it comes out times a power
// of two, and y in lane order is times the same power. A shift for each weight would cost as much as its product.
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
  static constexpr int64_t kLoadBytes = G * scaled_block_bytes(kType) / (kParts * kLoads);  // scales included
  static constexpr int kBits = 32 / kWeights;
  static constexpr int kLow = 20 / kBits;  // weights that lie within the mantissa of a float of 2^23
  static constexpr int32_t kOffset = kType == WeightType::q4_0 ? kQ4Offset : kQ8Offset;
  static constexpr int64_t kScaleBytes = scale_bytes(kType);

  static TS_INLINE typename S::I load(const std::byte* row, int64_t block, int part, int i) {
    const std::byte* dwords = row + head_bytes(kType) + block * scaled_block_bytes(kType) + G * kScaleBytes;
    return S::template load_bytes<4 * kWidth>(dwords + 4 * (part * kLanes + i * kStep));
  }
  static TS_INLINE typename S::F scales(const std::byte* row, int64_t block, int part) {
    if constexpr (kType == WeightType::ternary) {
      return S::template repeat<1>(reinterpret_cast<const float*>(row));
    } else {
      return S::template repeat_f16<kScales>(row + block * scaled_block_bytes(kType) + kScaleBytes * part * kLanes);
    }
  }
  // Where weight k of load i lies in lane order.
  static constexpr int lane(int part, int i, int k) { return k * kDwords * G + i * kStep + part * kLanes; }

  // Weight kIndex of each dword, times 2^shift(kIndex).
  template <int kIndex>
  static TS_INLINE typename S::F weight(typename S::I dwords, typename S::I high) {
    constexpr int kShift = shift(kIndex);
    constexpr int32_t kMask = (kBits == 4 ? 15 : 255) << kShift;
    return S::template field<kMask, kOffset << kShift>(kIndex < kLow ? dwords : high);
  }
  // The dwords whose first weight is weight kLow: what does not fit a float's mantissa is moved down.
  static TS_INLINE typename S::I high(typename S::I dwords) { return S::template shift_right<kLow * kBits>(dwords); }
  static constexpr int shift(int k) { return (k < kLow ? k : k - kLow) * kBits; }

  // Where column c of the group's first block lies in lane order, and the power that its lane is times.
  static constexpr int column(int c) {
    if (kType == WeightType::q4_0) return (c % 4 * 2 + c / 16) * kDwords * G + c % 16 / 4 * G;
    return c % 4 * kDwords * G + c / 4 * G;
  }
  static constexpr float power(int c) { return static_cast<float>(1 << shift(column(c) / (kDwords * G))); }
};

// One group of columns into lane order, and back.
template <class S, WeightType kType, int G>
static void to_lanes(const float* columns, float* lanes) {
  using Shape = Group<S, kType, G>;
  if constexpr (Shape::kFlat) {
    for (int b = 0; b < G; ++b) {
      for (int c = 0; c < kBlock; ++c) lanes[Shape::column(c) + b] = Shape::power(c) * columns[b * kBlock + c];
    }
    return;
  }
  constexpr int L = S::kLanes;
  for (int b = 0; b < G; b += L) {
    for (int c = 0; c < kBlock; c += L) {
      typename S::F square[L];
      TS_UNROLL for (int i = 0; i < L; ++i) square[i] = S::load(columns + (b + i) * kBlock + c);
      S::transpose(square);
      TS_UNROLL for (int i = 0; i < L; ++i) {
        S::store(lanes + Shape::column(c + i) + b, S::mul(square[i], S::set(Shape::power(c + i))));
      }
    }
  }
}

template <class S, WeightType kType, int G>
static void from_lanes(const float* lanes, float* columns) {
  using Shape = Group<S, kType, G>;
  if constexpr (Shape::kFlat) {
    for (int b = 0; b < G; ++b) {
      for (int c = 0; c < kBlock; ++c) columns[b * kBlock + c] = lanes[Shape::column(c) + b] / Shape::power(c);
    }
    return;
  }
  constexpr int L = S::kLanes;
  for (int b = 0; b < G; b += L) {
    for (int c = 0; c < kBlock; c += L) {
      typename S::F square[L];
      TS_UNROLL for (int i = 0; i < L; ++i) {
        square[i] = S::mul(S::load(lanes + Shape::column(c + i) + b), S::set(1.0f / Shape::power(c + i)));
      }
      S::transpose(square);
      TS_UNROLL for (int i = 0; i < L; ++i) S::store(columns + (b + i) * kBlock + c, square[i]);
    }
  }
}

// The group at `block` of a row, as its type says: [G * 32] columns.
template <class S, WeightType kType, int G>
static void decode_group(const std::byte* row, int64_t block, float* out) {
  using Shape = Group<S, kType, G>;
  alignas(64) float lanes[G * kBlock];
  for (int part = 0; part < Shape::kParts; ++part) {
    const auto scale = Shape::scales(row, block, part);
    for (int i = 0; i < Shape::kLoads; ++i) {
      const auto dwords = Shape::load(row, block, part, i);
      const auto high = Shape::high(dwords);
      [&]<int... k>(std::integer_sequence<int, k...>) {
        (S::template store_first<Shape::kWidth>(lanes + Shape::lane(part, i, k),
                                                S::mul(scale, Shape::template weight<k>(dwords, high))),
         ...);
      }(std::make_integer_sequence<int, Shape::kWeights>{});
    }
  }
  from_lanes<S, kType, G>(lanes, out);
}

// lanes += coefficient[r] * (group at `block` of row r), for r in order.
template <class S, WeightType kType, int G, int R, class Fetch>
static TS_INLINE inline void axpy_group(const Rows<R>& rows, Fetch& fetch, const float* coefficient, int64_t block,
                                        float* lanes) {
  using Shape = Group<S, kType, G>;
  TS_UNROLL for (int part = 0; part < Shape::kParts; ++part) {
    typename S::F factor[R];
    TS_UNROLL for (int r = 0; r < R; ++r) {
      factor[r] = S::mul(S::set(coefficient[r]), Shape::scales(rows.values[r], block, part));
    }
    TS_UNROLL for (int i = 0; i < Shape::kLoads; ++i) {
      fetch(Shape::kLoadBytes);
      typename S::I dwords[R], high[R];
      TS_UNROLL for (int r = 0; r < R; ++r) {
        dwords[r] = Shape::load(rows.values[r], block, part, i);
        high[r] = Shape::high(dwords[r]);
      }
      const auto add = [&]<int k>(std::integral_constant<int, k>) TS_INLINE {
        float* at = lanes + Shape::lane(part, i, k);
        auto sum = S::template load_first<Shape::kWidth>(at);
        TS_UNROLL for (int r = 0; r < R; ++r) {
          sum = S::fma(factor[r], Shape::template weight<k>(dwords[r], high[r]), sum);
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

// Columns of blocks [first, last) of R rows.
template <class S, WeightType kType, int R, class Fetch>
static void axpy_rows(const Rows<R>& rows, Fetch fetch, const float* coefficient, int64_t first, int64_t last,
                      float* lanes) {
  for_groups(first, last, [&]<int G>(Size<G>, int64_t block) {
    axpy_group<S, kType, G, R>(rows, fetch, coefficient, block, lanes + (block - first) * kBlock);
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
  constexpr int64_t kBytes = scaled_block_bytes(kType);
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
    const Lookahead<S> ahead(w, rows, n, first * kBytes, (last - first) * kBytes);
    int64_t i = 0;
    for (; i + kRows <= n; i += kRows) {
      const Rows<kRows> now(w, rows + i);
      axpy_rows<S, kType, kRows>(now, ahead.template after<kRows>(i), coefficient + i, first, last, lanes);
    }
    for (; i < n; ++i) axpy_rows<S, kType, 1>(Rows<1>(w, rows + i), NoFetch{}, coefficient + i, first, last, lanes);
    for_groups(first, last, [&]<int G>(Size<G>, int64_t block) {
      from_lanes<S, kType, G>(lanes + (block - first) * kBlock, y + block * kBlock);
    });
  }
}

template <class S, WeightType kType>
static void block_decode(const Matrix& w, int64_t row, float* out) {
  const Rows<1> one(w, row);
  for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
    decode_group<S, kType, G>(one.values[0], block, out + block * kBlock);
  });
}

}  // namespace turbosparse
