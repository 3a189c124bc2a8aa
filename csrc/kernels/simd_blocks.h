// SPDX-License-Identifier: Apache-2.0
// Dot products of blocked rows (q4_0, q8_0, ternary), in the words of an instruction set S. pack.h explains the layout.
#pragma once

#include <new>

#include "simd_drive.h"
#include "simd_lanes.h"

namespace turbosparse {

// Where the blocks of a term of an int8 vector lie.
struct Quants {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
};

static inline Quants quants_of(const Vectors& x, int term, int64_t v) {
  const Vectors& from = term == 0 ? x : *x.rest;
  const int64_t block = v * (from.cols / kBlock);
  return {from.q + v * from.cols, from.scale + block, from.sum + block};
}

// What undoes the offset of a type's unsigned quants: -bias times the sum of the activations of a block.
template <class S, WeightType kType>
inline constexpr int64_t kBias = kType == WeightType::ternary ? kTernaryOffset
                                 : kType == WeightType::q4_0  ? S::kQ4Bias
                                                              : S::kQ8Bias;

// Int8 vectors for BlockDot: N of kTerms terms each, the terms of a vector side by side. One vector is read where it
// is.
template <class S, WeightType kType, int N, int kTerms>
struct QuantVectors {
  static_assert(N == 1);
  Quants terms[kTerms];

  QuantVectors(const Matrix&, const Vectors& x, int64_t v) {
    for (int t = 0; t < kTerms; ++t) terms[t] = quants_of(x, t, v);
  }

  template <int G>
  TS_INLINE const std::byte* quants(int64_t block, int t) const {
    return reinterpret_cast<const std::byte*>(terms[t].q) + block * kBlock;
  }
  template <int G>
  TS_INLINE const float* scales(int64_t block, int t) const {
    return terms[t].scale + block;
  }
  template <int G, int kScales>
  TS_INLINE typename S::I start(int64_t block, int t, int part) const {
    if constexpr (kBias<S, kType> == 0) {
      return S::no_sum();
    } else {
      const auto sums = S::template load_ints<kScales>(terms[t].sum + block + part * S::kLanes);
      return S::shifted_negative(sums, __builtin_ctzll(kBias<S, kType>));  // a bias is a power of two
    }
  }
};

// Several vectors are copied group by group (quants of all vectors, their scales, their offsets), so that one address
// reaches all of them: with 24 addresses a short row costs more in spilled registers than in products.
template <class S, WeightType kType, int N, int kTerms>
  requires(N > 1)
struct QuantVectors<S, kType, N, kTerms> {
  static constexpr int kCount = N * kTerms;
  static constexpr int64_t kBlockBytes = kBlock + 8;  // of one block of one vector: quants, scale, offset
  std::byte* tile;

  QuantVectors(const Matrix& w, const Vectors& x, int64_t v)
      : tile(static_cast<std::byte*>(
            ::operator new(static_cast<size_t>(w.cols / kBlock * kBlockBytes * kCount), std::align_val_t{64}))) {
    for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
      std::byte* to = tile + block * kBlockBytes * kCount;
      for (int n = 0; n < kCount; ++n) {
        const Quants from = quants_of(x, n % kTerms, v + n / kTerms);
        __builtin_memcpy(to + n * G * kBlock, from.q + block * kBlock, G * kBlock);
        __builtin_memcpy(to + kCount * G * kBlock + n * G * 4, from.scale + block, G * 4);
        auto* offsets = reinterpret_cast<int32_t*>(to + kCount * G * (kBlock + 4)) + n * G;
        for (int b = 0; b < G; ++b) offsets[b] = static_cast<int32_t>(-kBias<S, kType>) * from.sum[block + b];
      }
    });
  }
  ~QuantVectors() { ::operator delete(tile, std::align_val_t{64}); }
  QuantVectors(const QuantVectors&) = delete;
  QuantVectors& operator=(const QuantVectors&) = delete;

  template <int G>
  TS_INLINE const std::byte* quants(int64_t block, int n) const {
    return tile + block * kBlockBytes * kCount + n * G * kBlock;
  }
  template <int G>
  TS_INLINE const float* scales(int64_t block, int n) const {
    return reinterpret_cast<const float*>(tile + block * kBlockBytes * kCount + kCount * G * kBlock) + n * G;
  }
  template <int G, int kScales>
  TS_INLINE typename S::I start(int64_t block, int n, int part) const {
    const std::byte* offsets = tile + block * kBlockBytes * kCount + kCount * G * (kBlock + 4);
    return S::template load_ints<kScales>(reinterpret_cast<const int32_t*>(offsets) + n * G + part * S::kLanes);
  }
};

// Row times int8 activations. One accumulator a (row, vector): the integer sum of a block, or of the part of it that
// its lane holds, times weight scale times activation scale, group by group, and term by term in a group.
template <class S, WeightType kType, int kTerms>
struct BlockDot {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kWideRows = S::kWideRows;
  static constexpr int kVectors = S::kVectors;
  static constexpr int64_t kInputBytes = kTerms * (kBlock + 8);  // quants, scale, offset
  static constexpr int kPlanes = kBlock / block_bytes(kType);    // quants in a byte
  static constexpr bool kTall = kType == WeightType::ternary;
  static constexpr bool kFetches = true;
  template <int N>
  using Input = QuantVectors<S, kType, N, kTerms>;

  template <int R, int N, class Fetch>
  static void run(const Matrix& w, const Rows<R>& rows, Fetch fetch, const Input<N>& input, float* out,
                  int64_t stride) {
    F total[R][N];
    TS_UNROLL for (int r = 0; r < R; ++r) { TS_UNROLL for (int n = 0; n < N; ++n) total[r][n] = S::zero(); }
    for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) __attribute__((always_inline)) {
      TS_UNROLL for (int part = 0; part < Group<S, kType, G>::kParts; ++part) {
        TS_UNROLL for (int t = 0; t < kTerms; ++t) add_group<G, R, N>(rows, fetch, input, block, part, t, total);
      }
    });
    store_sums<S, R, N>(total, out, stride);
  }

 private:
  template <int G, int R, int N, class Fetch>
  static TS_INLINE void add_group(const Rows<R>& rows, Fetch& fetch, const Input<N>& input, int64_t block, int part,
                                  int t, F (&total)[R][N]) {
    using Shape = Group<S, kType, G>;
    I sum[R][N];
    TS_UNROLL for (int n = 0; n < N; ++n) {
      const I start = input.template start<G, Shape::kScales>(block, n * kTerms + t, part);
      TS_UNROLL for (int r = 0; r < R; ++r) sum[r][n] = start;
    }
    TS_UNROLL for (int i = 0; i < Shape::kLoads; ++i) {
      if (t == 0) fetch(Shape::kLoadBytes);
      add_dwords<G, R, N>(rows, input, block, part, i, t, sum);
    }
    F scale[R];
    TS_UNROLL for (int r = 0; r < R; ++r) scale[r] = Shape::scales(rows.values[r], block, part);
    TS_UNROLL for (int n = 0; n < N; ++n) {
      const float* scales = input.template scales<G>(block, n * kTerms + t) + part * S::kLanes;
      const F activation = S::template repeat<Shape::kScales>(scales);
      TS_UNROLL for (int r = 0; r < R; ++r) {
        total[r][n] = S::fma(S::to_float(sum[r][n]), S::mul(scale[r], activation), total[r][n]);
      }
    }
  }

  // The products of load i of the rows: each of its quants is unpacked once for all vectors.
  template <int G, int R, int N>
  static TS_INLINE void add_dwords(const Rows<R>& rows, const Input<N>& input, int64_t block, int part, int i, int t,
                                   I (&sum)[R][N]) {
    using Shape = Group<S, kType, G>;
    I raw[R];
    TS_UNROLL for (int r = 0; r < R; ++r) raw[r] = Shape::load(rows.values[r], block, part, i);
    if constexpr (kPlanes > 2) {
      TS_UNROLL for (int r = 0; r < R; ++r) keep_in_register(raw[r]);
    }
    const int64_t place = 4 * (part * S::kLanes + i * Shape::kStep);
    TS_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
      I quants[R];
      TS_UNROLL for (int r = 0; r < R; ++r) quants[r] = quants_of_plane(raw[r], plane);
      TS_UNROLL for (int n = 0; n < N; ++n) {
        const std::byte* q = input.template quants<G>(block, n * kTerms + t) + place + kBlock / kPlanes * G * plane;
        const I activation = S::template load_bytes<4 * Shape::kWidth>(q);
        TS_UNROLL for (int r = 0; r < R; ++r) {
          if constexpr (kPlanes == 1) {
            sum[r][n] = S::dot_bytes(sum[r][n], quants[r], activation);
          } else {
            sum[r][n] = S::dot_nibbles(sum[r][n], quants[r], activation);
          }
        }
      }
    }
  }

  // Those bits of each byte that are one of its quants.
  static TS_INLINE I quants_of_plane(I raw, int plane) {
    if constexpr (kPlanes == 1) return raw;
    if constexpr (kPlanes == 2) return plane == 0 ? S::low_nibbles(raw) : S::high_nibbles(raw);
    return S::bit_pairs(raw, plane);
  }
};

// Row times fp32 activations: groups are decoded into a buffer, then multiplied as plain rows are.
template <class S, WeightType kType>
struct BlockDotF32 {
  using F = typename S::F;
  static constexpr int kWideRows = 1;
  static constexpr int kVectors = 8;
  static constexpr int64_t kInputBytes = 0;  // each row reads it anew anyway
  static constexpr bool kTall = false, kFetches = false;

  template <int N>
  using Input = FloatVectors<N>;

  template <int R, int N, class Fetch>
  static void run(const Matrix& w, const Rows<R>& rows, Fetch, const Input<N>& input, float* out, int64_t stride) {
    for (int r = 0; r < R; ++r) {
      F total[N];
      for (F& sum : total) sum = S::zero();
      for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
        alignas(64) float weights[G * kBlock];
        decode_group<S, kType, G>(rows.values[r], block, weights);
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
