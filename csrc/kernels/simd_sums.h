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

// The levels of two rows, whose blocks have scales `a` and `b`.
template <class S>
static TS_INLINE inline typename S::I levels_of(typename S::F a, typename S::F b, const float* factor) {
  return S::pair_low(S::to_int(S::mul(S::set(factor[0]), a)), S::to_int(S::mul(S::set(factor[1]), b)));
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
      const auto a = Shape::scales(rows.values[2 * p], block, part),
                 b = Shape::scales(rows.values[2 * p + 1], block, part);
      level[p] = levels_of<S>(a, b, factor + 2 * p);
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

// Part of a group of some pairs of rows, unpacked once for all vectors; small enough for the first-level cache.
template <class S, WeightType kType, int G>
class PairsOfRows {
  using Shape = Group<S, kType, G>;
  using I = typename S::I;
  static constexpr int kTogether = 4;  // weights of a dword whose sums are in registers at the same time
  static constexpr int kSteps = Shape::kLoads * Shape::kWeights / kTogether;

 public:
  static constexpr int64_t kMost = 16;

  void unpack(const std::byte* const* rows, int64_t pairs, int64_t block, int part) {
    constexpr int kHalf = Halves<kType>::kWeights;
    pairs_ = pairs;
    for (int64_t p = 0; p < pairs; ++p) {
      const std::byte *first = rows[2 * p], *second = rows[2 * p + 1];
      scales_[p][0] = Shape::scales(first, block, part);
      scales_[p][1] = Shape::scales(second, block, part);
      TS_UNROLL for (int i = 0; i < Shape::kLoads; ++i) {
        const I a = Shape::load(first, block, part, i), b = Shape::load(second, block, part, i);
        const I half[] = {S::pair_low(a, b), S::pair_high(a, b)};
        [&]<int... k>(std::integer_sequence<int, k...>) TS_INLINE {
          ((weights_[(i * Shape::kWeights + k) / kTogether][p][k % kTogether] =
                weights_of<S, kType, k % kHalf>(half[k / kHalf])),
           ...);
        }(std::make_integer_sequence<int, Shape::kWeights>{});
      }
    }
  }

  // For V vectors with factors [V, stride]: lanes [V, G * 32] += level * quant, sums [V, kGroup] += level.
  template <int V>
  void add(const float* factor, int64_t stride, int part, int32_t* lanes, int32_t* sums) const {
    I level[kMost][V];
    for (int v = 0; v < V; ++v) {
      int32_t* sum = sums + v * kGroup + part * S::kLanes;
      I total = S::template load_ints<S::kLanes>(sum);
      for (int64_t p = 0; p < pairs_; ++p) {
        level[p][v] = levels_of<S>(scales_[p][0], scales_[p][1], factor + v * stride + 2 * p);
        total = S::dot_words(total, S::ones(), level[p][v]);
      }
      S::template store_ints<S::kLanes>(sum, total);
    }
    for (int step = 0; step < kSteps; ++step) add_step<V>(step, level, part, lanes);
  }

 private:
  template <int V>
  TS_INLINE void add_step(int step, const I (&level)[kMost][V], int part, int32_t* lanes) const {
    const int i = step * kTogether / Shape::kWeights, first = step * kTogether % Shape::kWeights;
    const auto at = [&](int k, int v) { return lanes + v * G * kBlock + Shape::lane(part, i, first + k); };
    I sum[kTogether][V];
    TS_UNROLL for (int k = 0; k < kTogether; ++k) {
      TS_UNROLL for (int v = 0; v < V; ++v) sum[k][v] = S::template load_ints<Shape::kWidth>(at(k, v));
    }
    for (int64_t p = 0; p < pairs_; ++p) {
      TS_UNROLL for (int k = 0; k < kTogether; ++k) {
        TS_UNROLL for (int v = 0; v < V; ++v) sum[k][v] = S::dot_words(sum[k][v], weights_[step][p][k], level[p][v]);
      }
    }
    TS_UNROLL for (int k = 0; k < kTogether; ++k) {
      TS_UNROLL for (int v = 0; v < V; ++v) S::template store_ints<Shape::kWidth>(at(k, v), sum[k][v]);
    }
  }

  int64_t pairs_;
  typename S::F scales_[kMost][2];
  I weights_[kSteps][kMost][kTogether];
};

// The group at `block` of rows [first, last) for all vectors of `sum`: its lanes and levels.
template <class S, WeightType kType, int G>
static void sum_group_of_rows(const Matrix& w, int64_t first, int64_t last, int64_t block, const RowSums& sum) {
  using Pairs = PairsOfRows<S, kType, G>;
  constexpr int V = S::kSumVectors;
  constexpr int64_t kRows = 2 * Pairs::kMost, kBytes = G * scaled_block_bytes(kType);
  const int64_t stride = last - first + 1;
  Pairs pairs;
  for (int64_t begin = first; begin < last; begin += kRows) {
    const std::byte *rows[kRows], *next[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      rows[r] = w.values + (begin + r < last ? begin + r : last - 1) * w.row_bytes;
      next[r] = w.values + (begin + kRows + r < last ? begin + kRows + r : last - 1) * w.row_bytes;
    }
    const int64_t left = (last - begin + 1) / 2;
    for (int part = 0; part < Group<S, kType, G>::kParts; ++part) {
      pairs.unpack(rows, left < Pairs::kMost ? left : Pairs::kMost, block, part);
      int64_t fetched = 0;
      for (int64_t v = 0; v < sum.vectors; v += V) {
        for (; fetched * sum.vectors < kRows * (v + V); ++fetched) {  // evenly, while vectors are at work
          const std::byte* row = next[fetched] + block * scaled_block_bytes(kType);
          for (int64_t byte = 0; byte < kBytes && part == 0; byte += 64) prefetch(row + byte);
        }
        pairs.template add<V>(sum.factor + v * stride + (begin - first), stride, part, sum.lanes + v * G * kBlock,
                              sum.levels + v * kGroup);
      }
    }
  }
}

template <class S, WeightType kType>
static void block_sum_rows(const Matrix& w, int64_t first, int64_t last, const float* coefficient, int64_t stride,
                           int64_t count, float* y, int64_t y_stride) {
  const int64_t n = last - first;
  const RowSums sum(w, first, last, coefficient, stride, count, S::kSumVectors);
  for (int64_t i = 0; i < sum.n_in_floats; ++i) {
    const int64_t v = sum.in_floats[i];
    block_axpy_listed<S, kType>(w, sum.every, coefficient + v * stride, n, y + v * y_stride);
  }
  for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
    __builtin_memset(sum.lanes, 0, static_cast<size_t>(sum.vectors * G * kBlock) * sizeof(int32_t));
    __builtin_memset(sum.levels, 0, static_cast<size_t>(sum.vectors * kGroup) * sizeof(int32_t));
    sum_group_of_rows<S, kType, G>(w, first, last, block, sum);
    for (int64_t v = 0; v < count; ++v) {
      if (sum.scale[v] == 0) continue;
      add_sums<S, kType, G>(sum.lanes + v * G * kBlock, sum.levels + v * kGroup, sum.scale[v],
                            y + v * y_stride + block * kBlock);
    }
  });
}

}  // namespace turbosparse
