// SPDX-License-Identifier: Apache-2.0
// Dot products of q8_0 rows with vectors of two int8 terms, put together to one of 16 bits: x = word * scale / 256.
//
// Without VNNI a product of bytes is four instructions, and two terms are eight. Products of words are two for half as
// many weights, so that both terms together cost what one does. The words have half a step of their own, which is about
// what the second term has.
#pragma once

#include <new>

#include "simd_blocks.h"

namespace turbosparse {

// N vectors of words, copied group by group: of each vector the even and the odd columns of all dwords as pairs of
// words, then the scales of all vectors, then their offsets.
template <class S, int N>
struct WordVectors {
  static constexpr int64_t kWordBytes = 2 * kBlock;
  static constexpr int64_t kBlockBytes = kWordBytes + 8;  // of one block of one vector
  std::byte* tile;

  WordVectors(const Matrix& w, const Vectors& x, int64_t v)
      : tile(static_cast<std::byte*>(
            ::operator new(static_cast<size_t>(w.cols / kBlock * kBlockBytes * N), std::align_val_t{64}))) {
    for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) {
      for (int n = 0; n < N; ++n) join<G>(quants_of(x, 0, v + n), quants_of(x, 1, v + n), block, n);
    });
  }
  ~WordVectors() { ::operator delete(tile, std::align_val_t{64}); }
  WordVectors(const WordVectors&) = delete;
  WordVectors& operator=(const WordVectors&) = delete;

  template <int G>
  TS_INLINE std::byte* words(int64_t block, int n, int odd) const {
    return tile + block * kBlockBytes * N + (2 * n + odd) * G * kBlock;
  }
  template <int G>
  TS_INLINE float* scales(int64_t block, int n) const {
    return reinterpret_cast<float*>(tile + block * kBlockBytes * N + N * G * kWordBytes) + n * G;
  }
  template <int G>
  TS_INLINE int32_t* offsets(int64_t block, int n) const {
    return reinterpret_cast<int32_t*>(tile + block * kBlockBytes * N + N * G * (kWordBytes + 4)) + n * G;
  }

 private:
  template <int G>
  void join(const Quants& first, const Quants& second, int64_t block, int n) {
    constexpr int L = S::kLanes;
    float ratio[G];
    int32_t* offset = offsets<G>(block, n);
    for (int b = 0; b < G; ++b) {
      const float scale = first.scale[block + b], rest = second.scale[block + b];
      ratio[b] = scale > 0 ? 256.0f * rest / scale : 0.0f;
      scales<G>(block, n)[b] = scale / 256.0f + 0.0f * rest;  // what is no number shows
      offset[b] = 0;
    }
    const auto* a = reinterpret_cast<const std::byte*>(first.q + block * kBlock);
    const auto* b = reinterpret_cast<const std::byte*>(second.q + block * kBlock);
    for (int dword = 0; dword < G * kBlock / 4; dword += L) {
      const int64_t place = 4 * dword;
      const auto ratios = S::template repeat<(G < L ? G : L)>(ratio + dword % G);
      int32_t sum[L];
      S::join_words(a + place, b + place, ratios, words<G>(block, n, 0) + place, words<G>(block, n, 1) + place, sum);
      for (int l = 0; l < L; ++l) offset[(dword + l) % G] -= static_cast<int32_t>(kQ8Offset) * sum[l];
    }
  }
};

// A tile as BlockDot is, with one accumulator a (row, vector) and the integer sum of a block or of a lane's part of it.
template <class S>
struct WordDot {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kWideRows = S::kWideRows;
  static constexpr int kVectors = S::kVectors;
  static constexpr int64_t kInputBytes = WordVectors<S, 1>::kBlockBytes;
  static constexpr bool kTall = false, kFetches = true;
  template <int N>
  using Input = WordVectors<S, N>;

  template <int R, int N, class Fetch>
  static void run(const Matrix& w, const Rows<R>& rows, Fetch fetch, const Input<N>& input, float* out,
                  int64_t stride) {
    F total[R][N];
    TS_UNROLL for (int r = 0; r < R; ++r) { TS_UNROLL for (int n = 0; n < N; ++n) total[r][n] = S::zero(); }
    for_groups(0, w.cols / kBlock, [&]<int G>(Size<G>, int64_t block) __attribute__((always_inline)) {
      constexpr int kParts = Group<S, WeightType::q8_0, G>::kParts;
      TS_UNROLL for (int part = 0; part < kParts; ++part) add_group<G, R, N>(rows, fetch, input, block, part, total);
    });
    store_sums<S, R, N>(total, out, stride);
  }

 private:
  template <int G, int R, int N, class Fetch>
  static TS_INLINE void add_group(const Rows<R>& rows, Fetch& fetch, const Input<N>& input, int64_t block, int part,
                                  F (&total)[R][N]) {
    using Shape = Group<S, WeightType::q8_0, G>;
    I sum[R][N];
    TS_UNROLL for (int n = 0; n < N; ++n) {
      const int32_t* offsets = input.template offsets<G>(block, n) + part * S::kLanes;
      TS_UNROLL for (int r = 0; r < R; ++r) sum[r][n] = S::template load_ints<Shape::kScales>(offsets);
    }
    TS_UNROLL for (int i = 0; i < Shape::kLoads; ++i) {
      fetch(Shape::kLoadBytes);
      I raw[R];
      TS_UNROLL for (int r = 0; r < R; ++r) raw[r] = Shape::load(rows.values[r], block, part, i);
      const int64_t place = 4 * (part * S::kLanes + i * Shape::kStep);
      TS_UNROLL for (int odd = 0; odd < 2; ++odd) {
        I weights[R];
        TS_UNROLL for (int r = 0; r < R; ++r) {
          weights[r] = odd ? S::template words<8, 255>(raw[r]) : S::template words<0, 255>(raw[r]);
        }
        TS_UNROLL for (int n = 0; n < N; ++n) {
          const I words = S::template load_bytes<4 * Shape::kWidth>(input.template words<G>(block, n, odd) + place);
          TS_UNROLL for (int r = 0; r < R; ++r) sum[r][n] = S::dot_words(sum[r][n], weights[r], words);
        }
      }
    }
    F scale[R];
    TS_UNROLL for (int r = 0; r < R; ++r) scale[r] = Shape::scales(rows.values[r], block, part);
    TS_UNROLL for (int n = 0; n < N; ++n) {
      const F activation = S::template repeat<Shape::kScales>(input.template scales<G>(block, n) + part * S::kLanes);
      TS_UNROLL for (int r = 0; r < R; ++r) {
        total[r][n] = S::fma(S::to_float(sum[r][n]), S::mul(scale[r], activation), total[r][n]);
      }
    }
  }
};

}  // namespace turbosparse
