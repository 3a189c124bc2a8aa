// SPDX-License-Identifier: Apache-2.0
// Sums of blocked rows (q4_0, q8_0) times coefficients in integers, in the words of an instruction set S.
//
// A coefficient times the scale of a block becomes an int16 *level*; rows go in pairs, whose quants lie side by side in
// a dword and meet their two levels in one instruction. Sums of integers do not depend on their order, so a sum over a
// list has the bits of the sum over all rows, and those of a sum for several vectors at once.
#pragma once

#include "simd_drive.h"
#include "simd_lanes.h"
#include "sums.h"

namespace turbosparse {

// What a dword of a blocked row holds, as columns of two halves: 16 bits, weights kHalf * half and on.
template <WeightType kType>
struct Halves {
  static constexpr int kWeights = kType == WeightType::q4_0 ? 4 : 2;  // of a half
  static constexpr int kBits = 16 / kWeights;
};

// The levels of rows a and b for part `part` of the group at `block`.
template <class S, class Shape>
static TS_INLINE inline typename S::I levels_of(const std::byte* a, const std::byte* b, const float* factor,
                                                int64_t block, int part) {
  const auto first = S::to_int(S::mul(S::set(factor[0]), Shape::scales(a, block, part)));
  const auto second = S::to_int(S::mul(S::set(factor[1]), Shape::scales(b, block, part)));
  return S::pair_low(first, second);
}

// Weight k of both rows of a pair, from the half that holds it.
template <class S, WeightType kType, int k>
static TS_INLINE inline typename S::I weights_of(typename S::I half) {
  constexpr int kBits = Halves<kType>::kBits;
  return S::template words<k * kBits, (1 << kBits) - 1>(half);
}

// lanes += level * quant over P pairs of rows for the group at `block`, sums += level; `factor` makes levels of scales.
template <class S, WeightType kType, int G, int P, class Fetch>
static TS_INLINE inline void sum_group(const Rows<2 * P>& rows, Fetch& fetch, const float* factor, int64_t block,
                                       int32_t* lanes, int32_t* sums) {
  using Shape = Group<S, kType, G>;
  using I = typename S::I;
  constexpr int kHalf = Halves<kType>::kWeights;
  TS_UNROLL for (int part = 0; part < Shape::kParts; ++part) {
    I level[P];
    I total = S::template load_ints<S::kLanes>(sums + part * S::kLanes);
    TS_UNROLL for (int p = 0; p < P; ++p) {
      level[p] = levels_of<S, Shape>(rows.values[2 * p], rows.values[2 * p + 1], factor + 2 * p, block, part);
      total = S::dot_words(total, S::ones(), level[p]);
    }
    S::template store_ints<S::kLanes>(sums + part * S::kLanes, total);
    TS_UNROLL for (int i = 0; i < Shape::kLoads; ++i) {
      fetch(Shape::kLoadBytes);
      I half[2][P];
      TS_UNROLL for (int p = 0; p < P; ++p) {
        const I a = Shape::load(rows.values[2 * p], block, part, i);
        const I b = Shape::load(rows.values[2 * p + 1], block, part, i);
        half[0][p] = S::pair_low(a, b);
        half[1][p] = S::pair_high(a, b);
      }
      const auto add = [&]<int k>(std::integral_constant<int, k>) TS_INLINE {
        int32_t* at = lanes + Shape::lane(part, i, k);
        I sum = S::template load_ints<Shape::kWidth>(at);
        TS_UNROLL for (int p = 0; p < P; ++p) {
          sum = S::dot_words(sum, weights_of<S, kType, k % kHalf>(half[k / kHalf][p]), level[p]);
        }
        S::template store_ints<Shape::kWidth>(at, sum);
      };
      [&]<int... k>(std::integer_sequence<int, k...>) TS_INLINE {
        (add(std::integral_constant<int, k>{}), ...);
      }(std::make_integer_sequence<int, Shape::kWeights>{});
    }
  }
}

// y [G * 32 columns] += scale * (lanes - offset * sums), with which the quants become signed.
template <class S, WeightType kType, int G>
static void add_sums(const int32_t* lanes, const int32_t* sums, float scale, float* y) {
  using Shape = Group<S, kType, G>;
  if constexpr (Shape::kFlat) {
    for (int b = 0; b < G; ++b) {
      const uint32_t less = static_cast<uint32_t>(Shape::kOffset) * static_cast<uint32_t>(sums[b]);
      for (int c = 0; c < kBlock; ++c) {
        const uint32_t sum = static_cast<uint32_t>(lanes[Shape::column(c) + b]) - less;
        y[b * kBlock + c] += scale * static_cast<float>(static_cast<int32_t>(sum));
      }
    }
    return;
  }
  constexpr int L = S::kLanes;
  for (int b = 0; b < G; b += L) {
    const auto less = S::shifted_negative(S::template load_ints<L>(sums + b), __builtin_ctz(Shape::kOffset));
    for (int c = 0; c < kBlock; c += L) {
      typename S::F square[L];
      TS_UNROLL for (int i = 0; i < L; ++i) {
        const auto sum = S::add_ints(S::template load_ints<L>(lanes + Shape::column(c + i) + b), less);
        square[i] = S::mul(S::to_float(sum), S::set(scale));
      }
      S::transpose(square);
      TS_UNROLL for (int i = 0; i < L; ++i) {
        float* at = y + (b + i) * kBlock + c;
        S::store(at, S::add(S::load(at), square[i]));
      }
    }
  }
}

// Where the sums of levels of a group begin: a flat group repeats those of its few blocks over a whole vector.
template <class S, int G>
static constexpr int64_t place_of_sums(int64_t block) {
  return G < S::kLanes ? kTileBlocks + __builtin_ctz(G) * S::kLanes : block;
}
inline constexpr int64_t kSumsOfTile = kTileBlocks + 4 * kGroup;

template <class S, WeightType kType>
static void block_sum_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, int64_t most,
                             float* y) {
  constexpr int kRows = S::kListRows;
  constexpr int64_t kBytes = scaled_block_bytes(kType);
  const Levels levels = levels_for(w, rows, coefficient, n, most);
  if (levels.kind == Levels::none) return;
  if (levels.kind == Levels::floats) return block_axpy_listed<S, kType>(w, rows, coefficient, n, y);
  alignas(64) int32_t lanes[kTileBlocks * kBlock];
  alignas(64) int32_t sums[kSumsOfTile];
  const int64_t blocks = w.cols / kBlock;
  for (int64_t first = 0; first < blocks; first += kTileBlocks) {
    const int64_t last = first + kTileBlocks < blocks ? first + kTileBlocks : blocks;
    __builtin_memset(lanes, 0, static_cast<size_t>((last - first) * kBlock) * sizeof(int32_t));
    __builtin_memset(sums, 0, sizeof(sums));
    const Lookahead<S> ahead(w, rows, n, first * kBytes, (last - first) * kBytes);
    for (int64_t i = 0; i < n; i += kRows) {
      int32_t list[kRows];
      float factor[kRows];  // beyond the end of the list: the last row, not at all
      for (int r = 0; r < kRows; ++r) {
        list[r] = rows[i + r < n ? i + r : n - 1];
        factor[r] = i + r < n ? factor_of(levels, w, list[r], coefficient[i + r]) : 0;
      }
      const Rows<kRows> now(w, list);
      auto fetch = ahead.template after<kRows>(i);
      for_groups(first, last, [&]<int G>(Size<G>, int64_t block) __attribute__((always_inline)) {
        const int64_t in_tile = block - first;
        sum_group<S, kType, G, kRows / 2>(now, fetch, factor, block, lanes + in_tile * kBlock,
                                          sums + place_of_sums<S, G>(in_tile));
      });
    }
    for_groups(first, last, [&]<int G>(Size<G>, int64_t block) {
      const int64_t in_tile = block - first;
      add_sums<S, kType, G>(lanes + in_tile * kBlock, sums + place_of_sums<S, G>(in_tile), levels.scale,
                            y + block * kBlock);
    });
  }
}

// Pairs of rows whose levels for S::kSumVectors vectors stay in the first-level cache.
inline constexpr int64_t kChunkPairs = 64;

// One half of load i over a chunk of pairs: each quant is unpacked once for all V vectors.
template <class S, WeightType kType, int G, int V, int kHalf>
static void sum_half(const std::byte* const* rows, int64_t pairs, const typename S::I* level, int64_t block, int part,
                     int i, int32_t* lanes) {
  using Shape = Group<S, kType, G>;
  using I = typename S::I;
  constexpr int kWeights = Halves<kType>::kWeights;
  I sum[kWeights][V];
  const auto at = [&](int k, int v) { return lanes + v * G * kBlock + Shape::lane(part, i, kHalf * kWeights + k); };
  TS_UNROLL for (int k = 0; k < kWeights; ++k) {
    TS_UNROLL for (int v = 0; v < V; ++v) sum[k][v] = S::template load_ints<Shape::kWidth>(at(k, v));
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const I a = Shape::load(rows[2 * p], block, part, i), b = Shape::load(rows[2 * p + 1], block, part, i);
    const I half = kHalf == 0 ? S::pair_low(a, b) : S::pair_high(a, b);
    const auto add = [&]<int k>(std::integral_constant<int, k>) TS_INLINE {
      const I weights = weights_of<S, kType, k>(half);
      TS_UNROLL for (int v = 0; v < V; ++v) sum[k][v] = S::dot_words(sum[k][v], weights, level[p * V + v]);
    };
    [&]<int... k>(std::integer_sequence<int, k...>)
        TS_INLINE { (add(std::integral_constant<int, k>{}), ...); }(std::make_integer_sequence<int, kWeights>{});
  }
  TS_UNROLL for (int k = 0; k < kWeights; ++k) {
    TS_UNROLL for (int v = 0; v < V; ++v) S::template store_ints<Shape::kWidth>(at(k, v), sum[k][v]);
  }
}

// The group at `block` of rows [first, last) for V vectors: lanes [V, G * 32], sums [V, G or a vector]. `factor` [V,
// stride], with a zero behind that of the last row.
template <class S, WeightType kType, int G, int V>
static void sum_group_of_rows(const Matrix& w, int64_t first, int64_t last, const float* factor, int64_t stride,
                              int64_t block, int32_t* lanes, int32_t* sums) {
  using Shape = Group<S, kType, G>;
  using I = typename S::I;
  for (int64_t begin = first; begin < last; begin += 2 * kChunkPairs) {
    const int64_t end = begin + 2 * kChunkPairs < last ? begin + 2 * kChunkPairs : last;
    const int64_t pairs = (end - begin + 1) / 2;
    const std::byte* rows[2 * kChunkPairs];
    for (int64_t r = 0; r < 2 * pairs; ++r) {
      rows[r] = w.values + (begin + r < last ? begin + r : last - 1) * w.row_bytes;
    }
    for (int part = 0; part < Shape::kParts; ++part) {
      alignas(64) I level[kChunkPairs * V];
      for (int v = 0; v < V; ++v) {
        const float* of_vector = factor + v * stride + (begin - first);
        int32_t* sum = sums + v * kGroup + part * S::kLanes;
        I total = S::template load_ints<S::kLanes>(sum);
        for (int64_t p = 0; p < pairs; ++p) {
          const I pair = levels_of<S, Shape>(rows[2 * p], rows[2 * p + 1], of_vector + 2 * p, block, part);
          total = S::dot_words(total, S::ones(), pair);
          level[p * V + v] = pair;
        }
        S::template store_ints<S::kLanes>(sum, total);
      }
      for (int i = 0; i < Shape::kLoads; ++i) {
        sum_half<S, kType, G, V, 0>(rows, pairs, level, block, part, i, lanes);
        sum_half<S, kType, G, V, 1>(rows, pairs, level, block, part, i, lanes);
      }
    }
  }
}

template <class S, WeightType kType>
static void block_sum_rows(const Matrix& w, int64_t first, int64_t last, const float* coefficient, int64_t stride,
                           int64_t count, float* y, int64_t y_stride) {
  constexpr int V = S::kSumVectors;
  const int64_t n = last - first;
  const RowSums sum(w, first, last, coefficient, stride, count, V);
  for (int64_t i = 0; i < sum.n_in_floats; ++i) {
    const int64_t v = sum.in_floats[i];
    block_axpy_listed<S, kType>(w, sum.every, coefficient + v * stride, n, y + v * y_stride);
  }
  for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
    for (int64_t v = 0; v < count; v += V) {
      alignas(64) int32_t lanes[V * G * kBlock] = {};
      alignas(64) int32_t sums[V * kGroup] = {};
      sum_group_of_rows<S, kType, G, V>(w, first, last, sum.factor + v * (n + 1), n + 1, block, lanes, sums);
      for (int64_t i = 0; i < V && v + i < count; ++i) {
        if (sum.scale[v + i] == 0) continue;
        add_sums<S, kType, G>(lanes + i * G * kBlock, sums + i * kGroup, sum.scale[v + i],
                              y + (v + i) * y_stride + block * kBlock);
      }
    }
  });
}

}  // namespace turbosparse
