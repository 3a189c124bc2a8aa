// SPDX-License-Identifier: Apache-2.0
// Dot products of blocked rows (q4_0, q8_0), in the words of an instruction set S. pack.h explains the layout.
#pragma once

#include "simd_drive.h"
#include "simd_lanes.h"

namespace turbosparse {

// Row times int8 activations. One accumulator a (row, vector): the integer sum of a block, or of the part of it that
// its lane holds, times weight scale times activation scale, group by group.
template <class S, WeightType kType>
struct BlockDot {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kWideRows = 1;  // a row's quants are unpacked once for eight vectors
  static constexpr int kVectors = 8;
  static constexpr bool kNibbles = kType == WeightType::q4_0;
  static constexpr int64_t kBias = kNibbles ? S::kQ4Bias : S::kQ8Bias;

  template <int R, int N>
  static void run(const Matrix& w, const Rows<R>& rows, const Rows<R>& ahead, const Vectors& x, int64_t v, float* out,
                  int64_t stride) {
    F total[R][N];
    TS_UNROLL for (int r = 0; r < R; ++r) { TS_UNROLL for (int n = 0; n < N; ++n) total[r][n] = S::zero(); }
    for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) __attribute__((always_inline)) {
      TS_UNROLL for (int part = 0; part < Group<S, kType, G>::kParts; ++part) {
        add_group<G, R, N>(rows, x, v, block, part, total);
      }
      if constexpr (N == 1) fetch<G, R>(ahead, block);
    });
    TS_UNROLL for (int r = 0; r < R; ++r) {
      TS_UNROLL for (int n = 0; n < N; ++n) out[n * stride + r] = S::sum(total[r][n]);
    }
  }

 private:
  template <int G, int R>
  static TS_INLINE void fetch(const Rows<R>& ahead, int64_t block) {
    TS_UNROLL for (int r = 0; r < R; ++r) {
      for (int64_t byte = 0; byte < G * block_bytes(kType); byte += 64) {
        S::prefetch(ahead.values[r] + block * block_bytes(kType) + byte);
      }
    }
  }

  template <int G, int R, int N>
  static TS_INLINE void add_group(const Rows<R>& rows, const Vectors& x, int64_t v, int64_t block, int part,
                                  F (&total)[R][N]) {
    using Shape = Group<S, kType, G>;
    constexpr int kLoads = Shape::kLoads;
    const int64_t blocks = x.cols / kBlock;
    const int64_t first = block + part * S::kLanes;
    TS_UNROLL for (int r = 0; r < R; ++r) {
      I quants[kNibbles ? 2 * kLoads : kLoads];
      TS_UNROLL for (int i = 0; i < kLoads; ++i) {
        const I raw = Shape::load(rows.values[r], block, part, i);
        if constexpr (kNibbles) {
          quants[i] = S::low_nibbles(raw);
          quants[kLoads + i] = S::high_nibbles(raw);
        } else {
          quants[i] = raw;
        }
      }
      const F scale = S::template repeat_f16<Shape::kScales>(rows.scales[r] + 2 * first);
      TS_UNROLL for (int n = 0; n < N; ++n) {
        const int64_t vector = v + n;
        const I sum = dot_quants<G>(quants, x.q + vector * x.cols, block, part,
                                    start<Shape::kScales>(x.sum + vector * blocks + first));
        const F both = S::mul(scale, S::template repeat<Shape::kScales>(x.scale + vector * blocks + first));
        total[r][n] = S::fma(S::to_float(sum), both, total[r][n]);
      }
    }
  }

  // What undoes the offset of the unsigned quants: -bias times the sum of the activations.
  template <int kScales>
  static TS_INLINE I start(const int32_t* sums) {
    if constexpr (kBias == 0) return S::no_sum();
    return S::template offset<kScales, kBias>(sums);
  }

  template <int G>
  static TS_INLINE I dot_quants(const I* quants, const int8_t* q, int64_t block, int part, I sum) {
    using Shape = Group<S, kType, G>;
    constexpr int kLoads = Shape::kLoads;
    const auto* bytes = reinterpret_cast<const std::byte*>(q) + block * kBlock + 4 * part * S::kLanes;
    TS_UNROLL for (int i = 0; i < kLoads; ++i) {
      const I low = S::template load_bytes<4 * Shape::kWidth>(bytes + 4 * i * Shape::kStep);
      if constexpr (kNibbles) {
        const I high = S::template load_bytes<4 * Shape::kWidth>(bytes + 16 * G + 4 * i * Shape::kStep);
        sum = S::dot_nibbles(sum, quants[i], low);
        sum = S::dot_nibbles(sum, quants[kLoads + i], high);
      } else {
        sum = S::dot_bytes(sum, quants[i], low);
      }
    }
    return sum;
  }
};

// Row times fp32 activations: groups are decoded into a buffer, then multiplied as plain rows are.
template <class S, WeightType kType>
struct BlockDotF32 {
  using F = typename S::F;
  static constexpr int kWideRows = 1;
  static constexpr int kVectors = 8;

  template <int R, int N>
  static void run(const Matrix& w, const Rows<R>& rows, const Rows<R>&, const Vectors& x, int64_t v, float* out,
                  int64_t stride) {
    for (int r = 0; r < R; ++r) {
      F total[N];
      for (F& sum : total) sum = S::zero();
      for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
        alignas(64) float weights[G * kBlock];
        decode_group<S, kType, G>(rows.values[r], rows.scales[r], block, weights);
        const float* vector = x.x + v * x.cols + block * kBlock;
        for (int64_t c = 0; c < G * kBlock; c += S::kLanes) {
          for (int n = 0; n < N; ++n) {
            total[n] = S::fma(S::load(weights + c), S::load(vector + n * x.cols + c), total[n]);
          }
        }
      });
      for (int n = 0; n < N; ++n) out[n * stride + r] = S::sum(total[n]);
    }
  }
};

}  // namespace turbosparse
