// SPDX-License-Identifier: Apache-2.0
// Element-wise kernels, norms and attention's products, in the words of an instruction set S.
#pragma once

#include "pack.h"

namespace turbosparse {

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, with ln 2 in two parts so that r is exact; Taylor's series
// to r^7, whose remainder is below 2^-27. Error under 1 ulp for normal results; NaN stays NaN.
template <class S>
static typename S::F exp_of(typename S::F x) {
  using F = typename S::F;
  const F bounded = S::min(S::set(130.0f), S::max(S::set(-150.0f), x));
  const F n = S::round(S::mul(bounded, S::set(0x1.715476p+0f)));
  F r = S::fma(n, S::set(-0x1.63p-1f), bounded);
  r = S::fma(n, S::set(0x1.bd0106p-13f), r);
  F series = S::set(1.0f / 5040);
  series = S::fma(series, r, S::set(1.0f / 720));
  series = S::fma(series, r, S::set(1.0f / 120));
  series = S::fma(series, r, S::set(1.0f / 24));
  series = S::fma(series, r, S::set(1.0f / 6));
  series = S::fma(series, r, S::set(0.5f));
  series = S::fma(S::mul(series, r), r, r);
  return S::scale_by_power(S::add(series, S::set(1.0f)), n);
}

// out[i] = f(a[i], b[i]) for i < n; lanes past the end see zeros.
template <class S, class Map>
static void map_pairs(const float* a, const float* b, int64_t n, float* out, Map f) {
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) S::store(out + i, f(S::load(a + i), S::load(b + i)));
  if (i < n) S::store(out + i, f(S::load(a + i, n - i), S::load(b + i, n - i)), n - i);
}

template <class S>
static float exp_sum(float* x, int64_t n, float max) {
  typename S::F total = S::zero();
  const typename S::F shift = S::set(max);
  for (int64_t i = 0; i < n; i += S::kLanes) {
    const int64_t left = n - i < S::kLanes ? n - i : S::kLanes;
    const auto e = exp_of<S>(S::sub(S::load(x + i, left), shift));
    S::store(x + i, e, left);
    total = S::add(total, S::keep_first(e, left));
  }
  return S::sum(total);
}

template <class S>
static float maximum(const float* x, int64_t n) {
  float highest[S::kLanes];
  auto top = S::set(-__builtin_inff());
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) top = S::max(top, S::load(x + i));
  S::store(highest, top);
  float result = highest[0];
  for (const float value : highest) result = value > result ? value : result;
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <class S>
static typename S::F sigmoid_times(typename S::F x, typename S::F slope) {  // x / (1 + exp(-slope))
  return S::div(x, S::add(S::set(1.0f), exp_of<S>(S::sub(S::zero(), slope))));
}

template <class S>
static void swiglu(const float* gate, const float* up, int64_t n, float* h) {
  using F = typename S::F;
  map_pairs<S>(gate, up, n, h, [](F g, F u) { return S::mul(sigmoid_times<S>(g, g), u); });
}

// gelu_tanh(g) = g / 2 (1 + tanh u) = g / (1 + exp(-2u)), u = sqrt(2 / pi) (g + 0.044715 g^3).
template <class S>
static void geglu(const float* gate, const float* up, int64_t n, float* h) {
  using F = typename S::F;
  map_pairs<S>(gate, up, n, h, [](F g, F u) {
    const F cubic = S::fma(S::mul(g, g), S::set(0.044715f), S::set(1.0f));
    const F twice = S::mul(S::mul(g, S::set(1.5957691216057308f)), cubic);
    return S::mul(sigmoid_times<S>(g, twice), u);
  });
}

// Four accumulators, which hide the latency of the fma.
template <class S, class LoadA, class LoadB>
static float dot_of(int64_t n, LoadA a, LoadB b) {
  constexpr int64_t L = S::kLanes;
  typename S::F total[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int k = 0; k < 4; ++k) total[k] = S::fma(a(i + k * L, L), b(i + k * L, L), total[k]);
  }
  for (; i < n; i += L) {
    const int64_t left = n - i < L ? n - i : L;
    total[0] = S::fma(a(i, left), b(i, left), total[0]);
  }
  return S::sum(S::add(S::add(total[0], total[1]), S::add(total[2], total[3])));
}

template <class S>
static typename S::F part_of(const float* p, int64_t n) {
  return n == S::kLanes ? S::load(p) : S::load(p, n);
}

template <class S>
static void to_f16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; i += S::kLanes) {
    const int64_t left = n - i < S::kLanes ? n - i : S::kLanes;
    S::store_f16(out + i, part_of<S>(x + i, left), left);
  }
}

template <class S>
static void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const auto part = [x](int64_t i, int64_t left) { return part_of<S>(x + i, left); };
  const float mean = dot_of<S>(n, part, part) / static_cast<float>(n);
  const typename S::F factor = S::set(1.0f / __builtin_sqrtf(mean + eps));
  map_pairs<S>(x, weight, n, out,
               [factor](typename S::F value, typename S::F w) { return S::mul(S::mul(value, factor), w); });
}

template <class S>
static int64_t positive(const float* x, int64_t n, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += S::kLanes) {
    count += S::positive(x + i, n - i < S::kLanes ? n - i : S::kLanes, i, out + count);
  }
  return count;
}

// The same bits as the generic quantize: a maximum, one division a scale, rounding to nearest even.
template <class S>
static void quantize(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum) {
  const int64_t blocks = n / kBlock;
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    for (int64_t b = 0; b < group; ++b) {
      const float* from = x + (begin + b) * kBlock;
      const uint32_t largest = S::largest_bits(from);
      alignas(32) int8_t bytes[kBlock] = {};
      float inverse = 0;
      scale[begin + b] = largest >= 0x7f800000u ? __builtin_nanf("") : 0.0f;
      sum[begin + b] = 0;
      float amplitude;
      __builtin_memcpy(&amplitude, &largest, sizeof(float));
      if (amplitude >= 0x1p-100f && largest < 0x7f800000u) {
        scale[begin + b] = amplitude / 127.0f;
        inverse = 127.0f / amplitude;
        sum[begin + b] = S::round_block(from, inverse, bytes);
      }
      int8_t* into = q + begin * kBlock + 4 * b;
      for (int64_t dword = 0; dword < kBlock / 4; ++dword) {
        __builtin_memcpy(into + 4 * dword * group, bytes + 4 * dword, 4);
      }
    }
    begin += group;
  }
}

}  // namespace turbosparse
