// SPDX-License-Identifier: Apache-2.0
// AVX2, FMA and F16C: the words of simd_*.h for 8 lanes. Each file that includes this compiles a copy of its own.
#pragma once

#include <immintrin.h>

#include "pack.h"

namespace turbosparse {
namespace {

struct Avx2 {
  static constexpr const char* kIsa = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kWideRows = 2;  // rows and int8 vectors of a tile whose sums stay in 16 registers
  static constexpr int kVectors = 4;
  static constexpr int kListRows = 4;    // that are read side by side
  static constexpr int kSumVectors = 2;  // of a sum over all rows, in one go
  static constexpr int64_t kQ8Bias = 0;  // dot_bytes takes the 128 off before it multiplies
  static constexpr int64_t kQ4Bias = kQ4Offset;
  static constexpr bool kJoinsTerms = true;  // simd_words.h
  using F = __m256;
  using I = __m256i;

  static I first(int64_t n) {  // all bits of the first n lanes
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes());
  }
  static I lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, first(n), x); }
  // The first kCount lanes by a plain move: a masked store would not forward to the load that follows.
  template <int kCount>
  static F load_first(const float* p) {
    if constexpr (kCount == 8) return _mm256_loadu_ps(p);
    return _mm256_zextps128_ps256(_mm_loadu_ps(p));
  }
  template <int kCount>
  static void store_first(float* p, F x) {
    static_assert(kCount == 8 || kCount == 4);
    if constexpr (kCount == 8) _mm256_storeu_ps(p, x);
    if constexpr (kCount == 4) _mm_storeu_ps(p, _mm256_castps256_ps128(x));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_f16(const uint16_t* p, int64_t n) { return _mm256_cvtph_ps(load_halves(p, n)); }
  static F load_bf16(const uint16_t* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_bf16(const uint16_t* p, int64_t n) { return widen_bf16(load_halves(p, n)); }
  static void store_f16(uint16_t* p, F x, int64_t n) {
    alignas(16) uint16_t halves[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(halves), _mm256_cvtps_ph(x, 0));
    __builtin_memcpy(p, halves, static_cast<size_t>(n) * sizeof(uint16_t));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }  // b where either is NaN
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F keep_first(F x, int64_t n) { return _mm256_and_ps(x, _mm256_castsi256_ps(first(n))); }

  // a * 2^n in two steps, since 2^n alone may be no normal number; |n| <= 250.
  static F scale_by_power(F a, F n) {
    const I whole = _mm256_cvtps_epi32(n);
    const I half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(whole, half)));
  }

  // The sum of the lanes, always in this order: halves, then pairs.
  static float sum(F x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehdup_ps(half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehl_ps(half, half)));
  }

  // Four sums, each in the order of sum().
  static void sum4(const F* x, float* out) {
    const F ab = _mm256_add_ps(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
    const F cd = _mm256_add_ps(_mm256_permute2f128_ps(x[2], x[3], 0x20), _mm256_permute2f128_ps(x[2], x[3], 0x31));
    const F pairs = _mm256_hadd_ps(ab, cd);       // a a c c | b b d d
    const F sums = _mm256_hadd_ps(pairs, pairs);  // a c a c | b d b d
    const __m128 a_c = _mm256_castps256_ps128(sums);
    _mm_storeu_ps(out, _mm_unpacklo_ps(a_c, _mm256_extractf128_ps(sums, 1)));
  }

  // First `kCount` bytes; the rest is zero.
  template <int kCount>
  static I load_bytes(const std::byte* p) {
    static_assert(kCount == 32 || kCount == 16 || kCount == 8);
    if constexpr (kCount == 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kCount == 8) return _mm256_zextsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I low_nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static I high_nibbles(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
  static I bit_pairs(I x, int plane) { return _mm256_and_si256(_mm256_srli_epi16(x, 2 * plane), _mm256_set1_epi8(3)); }
  static I dot_nibbles(I sum, I w, I q) {  // pairs stay below 2 * 15 * 127
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), _mm256_set1_epi16(1)));
  }
  static I dot_bytes(I sum, I w, I q) {  // |w| times q with w's sign: pairs stay below 2 * 128 * 127, which fits
    const I signed_w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed_w), _mm256_sign_epi8(q, signed_w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  template <int kCount>
  static void store_ints(int32_t* p, I x) {
    static_assert(kCount == 8 || kCount == 4);
    if constexpr (kCount == 8) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    if constexpr (kCount == 4) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(x));
  }
  static I no_sum() { return _mm256_setzero_si256(); }
  static I add_ints(I a, I b) { return _mm256_add_epi32(a, b); }

  // Dwords as pairs of int16: the sum of both products, the low and the high words of a and b side by side, and bits
  // of each word.
  static I dot_words(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static I ones() { return _mm256_set1_epi16(1); }
  static I pair_low(I a, I b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa); }
  static I pair_high(I a, I b) { return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa); }
  // Eight dwords of four int8 each, of two terms whose scales are 256 to `ratio`: their joint words, of the even and
  // of the odd columns, and the sum of each dword's.
  static void join_words(const std::byte* first, const std::byte* second, F ratio, std::byte* even, std::byte* odd,
                         int32_t* sum) {
    const I high = load_bytes<32>(first), low = load_bytes<32>(second);
    I word[4];
    for (int k = 0; k < 4; ++k) {
      const I rest = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(byte_of(low, k)), ratio));
      const I joint = _mm256_add_epi32(_mm256_slli_epi32(byte_of(high, k), 8), rest);
      word[k] = _mm256_max_epi32(_mm256_min_epi32(joint, _mm256_set1_epi32(32767)), _mm256_set1_epi32(-32768));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), pair_low(word[0], word[2]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), pair_low(word[1], word[3]));
    const I halves = _mm256_add_epi32(_mm256_add_epi32(word[0], word[1]), _mm256_add_epi32(word[2], word[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum), halves);
  }
  template <int kShift, int kMask>
  static I words(I x) {
    const I shifted = kShift == 0 ? x : _mm256_srli_epi16(x, kShift);
    return (kMask << kShift) >> 8 >= 0x80 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16(kMask));
  }
  static I to_int(F x) { return _mm256_cvtps_epi32(x); }  // to nearest even

  static I shifted_negative(I x, int bits) {
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(x, bits));
  }
  // The first kCount numbers; the rest is zero.
  template <int kCount>
  static I load_ints(const int32_t* p) {
    const auto* quarter = reinterpret_cast<const __m128i*>(p);
    if constexpr (kCount >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kCount == 4) return _mm256_zextsi128_si256(_mm_loadu_si128(quarter));
    if constexpr (kCount == 2) return _mm256_zextsi128_si256(_mm_loadl_epi64(quarter));
    return _mm256_zextsi128_si256(_mm_cvtsi32_si128(*p));
  }

  // kCount scales, repeated over the lanes.
  template <int kCount>
  static F repeat(const float* p) {
    if constexpr (kCount >= 8) return _mm256_loadu_ps(p);
    if constexpr (kCount == 4) return spread4(_mm_loadu_ps(p));
    if constexpr (kCount == 2) return spread2(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    return _mm256_set1_ps(*p);
  }
  template <int kCount>
  static F repeat_f16(const std::byte* p) {
    const auto* bytes = reinterpret_cast<const __m128i*>(p);
    if constexpr (kCount >= 8) return _mm256_cvtph_ps(_mm_loadu_si128(bytes));
    if constexpr (kCount == 4) return spread4(_mm_cvtph_ps(_mm_loadl_epi64(bytes)));
    if constexpr (kCount == 2) return spread2(_mm_cvtph_ps(_mm_loadu_si32(p)));
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_loadu_si16(p)));
  }

  // The bits kMask of each dword, less kOffset: they become the last bits of a float of 2^23.
  template <int32_t kMask, int32_t kOffset>
  static F field(I dwords) {
    const I bits = _mm256_and_si256(dwords, _mm256_set1_epi32(kMask));
    const I mixed = _mm256_or_si256(bits, _mm256_set1_epi32(0x4b000000));
    return _mm256_sub_ps(_mm256_castsi256_ps(mixed), _mm256_set1_ps(0x1p23f + static_cast<float>(kOffset)));
  }
  template <int kBits>
  static I shift_right(I x) {
    return _mm256_srli_epi32(x, kBits);
  }

  static void transpose(F (&r)[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        const __m256d a = _mm256_castps_pd(t[i + k]);
        const __m256d b = _mm256_castps_pd(t[i + k + 2]);
        r[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        r[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
      }
    }
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
      t[4 + c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

  // 32 floats to bytes by x * inverse; returns the sum of the bytes.
  static int32_t round_block(const float* x, float inverse, int8_t* q) {
    const F factor = _mm256_set1_ps(inverse);
    I words[4];
    for (int i = 0; i < 4; ++i) words[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
    const I packed = _mm256_packs_epi16(_mm256_packs_epi32(words[0], words[1]), _mm256_packs_epi32(words[2], words[3]));
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_store_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(packed, order));
    const I total = _mm256_add_epi32(_mm256_add_epi32(words[0], words[1]), _mm256_add_epi32(words[2], words[3]));
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), total);
    return lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
  }
  // The largest magnitude of 32 floats, as bits: a NaN is larger than everything.
  static uint32_t largest_bits(const float* x) {
    const I clear = _mm256_set1_epi32(0x7fffffff);
    I largest = _mm256_setzero_si256();
    for (int i = 0; i < kBlock; i += 8) {
      const I bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
      largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, clear));
    }
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
  }

  // Writes the indices of up to 8 positive x; returns how many.
  static int64_t positive(const float* x, int64_t n, int64_t base, int32_t* out) {
    unsigned fires = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(load(x, n), zero(), _CMP_GT_OQ)));
    int64_t count = 0;
    for (; fires; fires &= fires - 1) out[count++] = static_cast<int32_t>(base + __builtin_ctz(fires));
    return count;
  }

 private:
  static I byte_of(I dwords, int k) { return _mm256_srai_epi32(_mm256_slli_epi32(dwords, 24 - 8 * k), 24); }
  static F widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static __m128i load_halves(const uint16_t* p, int64_t n) {
    alignas(16) uint16_t halves[8] = {};
    __builtin_memcpy(halves, p, static_cast<size_t>(n) * sizeof(uint16_t));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(halves));
  }
  static F power(I n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static F spread4(__m128 x) { return _mm256_insertf128_ps(_mm256_castps128_ps256(x), x, 1); }
  static F spread2(__m128 x) { return _mm256_castpd_ps(_mm256_broadcastsd_pd(_mm_castps_pd(x))); }
};

}  // namespace
}  // namespace turbosparse
