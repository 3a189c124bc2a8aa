// SPDX-License-Identifier: Apache-2.0
// Dot products of blocked rows (q4_0, q8_0), in the words of an instruction set S. pack.h explains the layout.
#pragma once

#include <new>

#include "simd_drive.h"
#include "simd_lanes.h"

namespace turbosparse {

// What undoes the offset of a type's unsigned quants: -bias times the sum of the activations of a block.
template <class S, WeightType kType>
inline constexpr int64_t kBias = kType == WeightType::q4_0 ? S::kQ4Bias : S::kQ8Bias;

// Int8 vectors for BlockDot. One vector is read where it is.
template <class S, WeightType kType, int N>
struct QuantVectors {
  static_assert(N == 1);
  const std::byte* q;
  const float* scale;
  const int32_t* sum;

  QuantVectors(const Matrix& w, const Vectors& x, int64_t v)
      : q(reinterpret_cast<const std::byte*>(x.q) + v * w.cols),
        scale(x.scale + v * (w.cols / kBlock)),
        sum(x.sum + v * (w.cols / kBlock)) {}

  template <int G>
  TS_INLINE const std::byte* quants(int64_t block, int) const {
    return q + block * kBlock;
  }
  template <int G>
  TS_INLINE const float* scales(int64_t block, int) const {
    return scale + block;
  }
  template <int G, int kScales>
  TS_INLINE typename S::I start(int64_t block, int, int part) const {
    if constexpr (kBias<S, kType> == 0) {
      return S::no_sum();
    } else {
      const auto sums = S::template load_ints<kScales>(sum + block + part * S::kLanes);
      return S::shifted_negative(sums, __builtin_ctzll(kBias<S, kType>));  // a bias is a power of two
    }
  }
};

// Several vectors are copied group by group (quants of all vectors, their scales, their offsets), so that one address
// reaches all of them: with 24 addresses a short row costs more in spilled registers than in products.
template <class S, WeightType kType, int N>
  requires(N > 1)
struct QuantVectors<S, kType, N> {
  static constexpr int64_t kBlockBytes = kBlock + 8;  // of one block of one vector: quants, scale, offset
  std::byte* tile;

  QuantVectors(const Matrix& w, const Vectors& x, int64_t v)
      : tile(static_cast<std::byte*>(
            ::operator new(static_cast<size_t>(w.cols / kBlock * kBlockBytes * N), std::align_val_t{64}))) {
    const int64_t blocks = w.cols / kBlock;
    for_groups(0, blocks, [&]<int G>(Size<G>, int64_t block) {
      std::byte* to = tile + block * kBlockBytes * N;
      for (int n = 0; n < N; ++n) {
        __builtin_memcpy(to + n * G * kBlock, x.q + (v + n) * w.cols + block * kBlock, G * kBlock);
        const int64_t from = (v + n) * blocks + block;
        __builtin_memcpy(to + N * G * kBlock + n * G * 4, x.scale + from, G * 4);
        for (int b = 0; b < G; ++b) {
          const auto offset = static_cast<int32_t>(-kBias<S, kType> * x.sum[from + b]);
          __builtin_memcpy(to + N * G * (kBlock + 4) + (n * G + b) * 4, &offset, 4);
        }
      }
    });
  }
  ~QuantVectors() { ::operator delete(tile, std::align_val_t{64}); }
  QuantVectors(const QuantVectors&) = delete;
  QuantVectors& operator=(const QuantVectors&) = delete;

  template <int G>
  TS_INLINE const std::byte* quants(int64_t block, int n) const {
    return tile + block * kBlockBytes * N + n * G * kBlock;
  }
  template <int G>
  TS_INLINE const float* scales(int64_t block, int n) const {
    return reinterpret_cast<const float*>(tile + block * kBlockBytes * N + N * G * kBlock) + n * G;
  }
  template <int G, int kScales>
  TS_INLINE typename S::I start(int64_t block, int n, int part) const {
    const std::byte* offsets = tile + block * kBlockBytes * N + N * G * (kBlock + 4);
    return S::template load_ints<kScales>(reinterpret_cast<const int32_t*>(offsets) + n * G + part * S::kLanes);
  }
};

// Row times int8 activations. One accumulator a (row, vector): the integer sum of a block, or of the part of it that
// its lane holds, times weight scale times activation scale, group by group.
template <class S, WeightType kType>
struct BlockDot {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kWideRows = 1;  // a row's quants are unpacked once for eight vectors
  static constexpr int kVectors = 8;
  static constexpr bool kNibbles = kType == WeightType::q4_0;
  template <int N>
  using Input = QuantVectors<S, kType, N>;

  template <int R, int N>
  static void run(const Matrix& w, const Rows<R>& rows, const Rows<R>& ahead, const Input<N>& input, float* out,
                  int64_t stride) {
    F total[R][N];
    TS_UNROLL for (int r = 0; r < R; ++r) { TS_UNROLL for (int n = 0; n < N; ++n) total[r][n] = S::zero(); }
    for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) __attribute__((always_inline)) {
      TS_UNROLL for (int part = 0; part < Group<S, kType, G>::kParts; ++part) {
        add_group<G, R, N>(rows, input, block, part, total);
      }
      if constexpr (N == 1) fetch<G, R>(ahead, block);
    });
    store_sums<S, R, N>(total, out, stride);
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
  static TS_INLINE void add_group(const Rows<R>& rows, const Input<N>& input, int64_t block, int part,
                                  F (&total)[R][N]) {
    using Shape = Group<S, kType, G>;
    constexpr int kLoads = Shape::kLoads;
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
      const F scale = Shape::scales(rows.scales[r], block, part);
      TS_UNROLL for (int n = 0; n < N; ++n) {
        const I sum = dot_quants<G>(quants, input.template quants<G>(block, n) + 4 * part * S::kLanes,
                                    input.template start<G, Shape::kScales>(block, n, part));
        const float* scales = input.template scales<G>(block, n) + part * S::kLanes;
        const F both = S::mul(scale, S::template repeat<Shape::kScales>(scales));
        total[r][n] = S::fma(S::to_float(sum), both, total[r][n]);
      }
    }
  }

  template <int G>
  static TS_INLINE I dot_quants(const I* quants, const std::byte* q, I sum) {
    using Shape = Group<S, kType, G>;
    constexpr int kLoads = Shape::kLoads;
    TS_UNROLL for (int i = 0; i < kLoads; ++i) {
      const I low = S::template load_bytes<4 * Shape::kWidth>(q + 4 * i * Shape::kStep);
      if constexpr (kNibbles) {
        const I high = S::template load_bytes<4 * Shape::kWidth>(q + 16 * G + 4 * i * Shape::kStep);
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

  template <int N>
  using Input = FloatVectors<N>;

  template <int R, int N>
  static void run(const Matrix& w, const Rows<R>& rows, const Rows<R>&, const Input<N>& input, float* out,
                  int64_t stride) {
    for (int r = 0; r < R; ++r) {
      F total[N];
      for (F& sum : total) sum = S::zero();
      for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
        alignas(64) float weights[G * kBlock];
        decode_group<S, kType, G>(rows.values[r], rows.scales[r], block, weights);
        const float* vector = input.x + block * kBlock;
        for (int64_t c = 0; c < G * kBlock; c += S::kLanes) {
          for (int n = 0; n < N; ++n) {
            total[n] = S::fma(S::load(weights + c), S::load(vector + n * input.cols + c), total[n]);
          }
        }
      });
      for (int n = 0; n < N; ++n) out[n * stride + r] = S::sum(total[n]);
    }
  }
};

}  // namespace turbosparse
