// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, DQ, VL and VNNI: the words of simd_*.h for 16 lanes.
#include "isa.h"

#ifdef TURBOSPARSE_X86

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own headers (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "simd_table.h"

namespace turbosparse {
namespace {

struct Avx512 {
  static constexpr const char* kIsa = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kWideRows = 4;  // rows and int8 vectors of a tile whose sums stay in 32 registers
  static constexpr int kVectors = 4;
  static constexpr int kListRows = 8;            // that are read side by side
  static constexpr int kSumVectors = 4;          // of a sum over all rows, in one go
  static constexpr int64_t kQ8Bias = kQ8Offset;  // the unsigned byte is multiplied as stored; `sum` takes its 128 back
  static constexpr int64_t kQ4Bias = kQ4Offset;
  static constexpr bool kJoinsTerms = false;
  using F = __m512;
  using I = __m512i;

  static __mmask16 mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), x); }
  // The first kCount lanes by a plain move: a masked store would not forward to the load that follows.
  template <int kCount>
  static F load_first(const float* p) {
    if constexpr (kCount == 16) return _mm512_loadu_ps(p);
    if constexpr (kCount == 8) return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
    return _mm512_zextps128_ps512(_mm_loadu_ps(p));
  }
  template <int kCount>
  static void store_first(float* p, F x) {
    static_assert(kCount == 16 || kCount == 8 || kCount == 4);
    if constexpr (kCount == 16) _mm512_storeu_ps(p, x);
    if constexpr (kCount == 8) _mm256_storeu_ps(p, _mm512_castps512_ps256(x));
    if constexpr (kCount == 4) _mm_storeu_ps(p, _mm512_castps512_ps128(x));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_f16(const uint16_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static F load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load_bf16(const uint16_t* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static void store_f16(uint16_t* p, F x, int64_t n) { _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(x, 0)); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n
  static F keep_first(F x, int64_t n) { return _mm512_maskz_mov_ps(mask(n), x); }

  // The sum of the lanes, always in this order: halves, quarters, then pairs.
  static float sum(F x) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehdup_ps(quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehl_ps(quarter, quarter)));
  }

  // Four sums, each in the order of sum().
  static void sum4(const F* x, float* out) {
    const F ab = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
    const F cd = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
    F quarters = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    quarters = _mm512_add_ps(quarters, _mm512_movehdup_ps(quarters));
    quarters = _mm512_add_ps(quarters, _mm512_permute_ps(quarters, 0x02));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, quarters)));
  }

  // First `kCount` bytes; the rest is zero.
  template <int kCount>
  static I load_bytes(const std::byte* p) {
    static_assert(kCount == 64 || kCount == 32 || kCount == 16 || kCount == 8);
    if constexpr (kCount == 64) return _mm512_loadu_si512(p);
    if constexpr (kCount == 8) return _mm512_zextsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    if constexpr (kCount == 32) return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  static I bit_pairs(I x, unsigned plane) {
    return _mm512_and_si512(_mm512_srli_epi16(x, 2 * plane), _mm512_set1_epi8(3));
  }
  static I dot_nibbles(I sum, I w, I q) { return _mm512_dpbusd_epi32(sum, w, q); }
  static I dot_bytes(I sum, I w, I q) { return _mm512_dpbusd_epi32(sum, w, q); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

  static I shifted_negative(I x, unsigned bits) {
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(x, bits));
  }
  // The first kCount numbers; the rest is zero.
  template <int kCount>
  static I load_ints(const int32_t* p) {
    return kCount >= 16 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(mask(kCount), p);
  }
  template <int kCount>
  static void store_ints(int32_t* p, I x) {
    static_assert(kCount == 16 || kCount == 8 || kCount == 4);
    if constexpr (kCount == 16) _mm512_storeu_si512(p, x);
    if constexpr (kCount == 8) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(x));
    if constexpr (kCount == 4) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(x));
  }
  static I no_sum() { return _mm512_setzero_si512(); }
  static I add_ints(I a, I b) { return _mm512_add_epi32(a, b); }

  // Dwords as pairs of int16: the sum of both products, the low and the high words of a and b side by side, and bits
  // of each word.
  static I dot_words(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static I ones() { return _mm512_set1_epi16(1); }
  static I pair_low(I a, I b) { return _mm512_mask_blend_epi16(0xaaaaaaaau, a, _mm512_slli_epi32(b, 16)); }
  static I pair_high(I a, I b) { return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b); }
  template <int kShift, int kMask>
  static I words(I x) {
    const I shifted = kShift == 0 ? x : _mm512_srli_epi16(x, kShift);
    return (kMask << kShift) >> 8 >= 0x80 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(kMask));
  }
  static I to_int(F x) { return _mm512_cvtps_epi32(x); }  // to nearest even

  // kCount scales, repeated over the lanes.
  template <int kCount>
  static F repeat(const float* p) {
    if constexpr (kCount >= 16) return _mm512_loadu_ps(p);
    if constexpr (kCount == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    if constexpr (kCount == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (kCount == 2) {
      return _mm512_castpd_ps(
          _mm512_broadcastsd_pd(_mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
    }
    return _mm512_set1_ps(*p);
  }
  template <int kCount>
  static F repeat_f16(const std::byte* p) {
    if constexpr (kCount >= 16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (kCount == 8) {
      return _mm512_broadcast_f32x8(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    if constexpr (kCount == 4) {
      return _mm512_broadcast_f32x4(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    if constexpr (kCount == 2) {
      return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_castps_pd(_mm_cvtph_ps(_mm_loadu_si32(p)))));
    }
    return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_loadu_si16(p)));
  }

  // The bits kMask of each dword, less kOffset: they become the last bits of a float of 2^23.
  template <int32_t kMask, int32_t kOffset>
  static F field(I dwords) {
    if constexpr (kMask == 15) {  // a look-up by the low four bits of a lane
      const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      return _mm512_permutexvar_ps(dwords, _mm512_sub_ps(table, _mm512_set1_ps(static_cast<float>(kOffset))));
    }
    const I mixed = _mm512_ternarylogic_epi32(dwords, _mm512_set1_epi32(kMask), _mm512_set1_epi32(0x4b000000), 0xea);
    return _mm512_sub_ps(_mm512_castsi512_ps(mixed), _mm512_set1_ps(0x1p23f + static_cast<float>(kOffset)));
  }
  template <int kBits>
  static I shift_right(I x) {
    return _mm512_srli_epi32(x, kBits);
  }

  static void transpose(F (&r)[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int k = 0; k < 2; ++k) {
        const __m512d a = _mm512_castps_pd(t[i + k]);
        const __m512d b = _mm512_castps_pd(t[i + k + 2]);
        r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    }
    // Now lane quarter m of r[4 i + c] holds rows 4 i .. 4 i + 3 of column 4 m + c: transpose the quarters.
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
      t[4 + c] = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
      t[8 + c] = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
      t[12 + c] = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; ++c) {
      r[c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0x88);
      r[8 + c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0xdd);
      r[4 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0x88);
      r[12 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0xdd);
    }
  }

  // 32 floats to bytes by x * inverse; returns the sum of the bytes.
  static int32_t round_block(const float* x, float inverse, int8_t* q) {
    const I low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
    const I high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), _mm512_set1_ps(inverse)));
    _mm_store_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(low));
    _mm_store_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(high));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
  }
  // The largest magnitude of 32 floats, as bits: a NaN is larger than everything.
  static uint32_t largest_bits(const float* x) {
    const I clear = _mm512_set1_epi32(0x7fffffff);
    const I low = _mm512_and_si512(_mm512_loadu_si512(x), clear);
    const I high = _mm512_and_si512(_mm512_loadu_si512(x + 16), clear);
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(low, high)));
  }

  // Writes the indices of up to 16 positive x, all lanes of `out` where n is 16; returns how many.
  static int64_t positive(const float* x, int64_t n, int64_t base, int32_t* out) {
    const __mmask16 fires = _mm512_cmp_ps_mask(load(x, n), zero(), _CMP_GT_OQ);
    const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I indices = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(base)));
    const int count = __builtin_popcount(fires);
    _mm512_mask_storeu_epi32(out, mask(count), _mm512_maskz_compress_epi32(fires, indices));
    return count;
  }

 private:
  static F widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
};

}  // namespace

constinit const Kernels kAvx512Kernels = simd_table<Avx512>();

}  // namespace turbosparse

#endif
