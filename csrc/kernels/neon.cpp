// SPDX-License-Identifier: Apache-2.0
// NEON with the dot product instructions of Armv8.2: the words of simd_*.h for 4 lanes.
#include "isa.h"

#ifdef TURBOSPARSE_ARM

#include <arm_neon.h>

#include "simd_table.h"

namespace turbosparse {
namespace {

struct Neon {
  static constexpr const char* kIsa = "neon";
  static constexpr int kLanes = 4;
  static constexpr int kWideRows = 4;  // rows and int8 vectors of a tile whose sums stay in 32 registers
  static constexpr int kVectors = 4;
  static constexpr int kListRows = 8;    // that are read side by side
  static constexpr int kSumVectors = 4;  // of a sum over all rows, in one go
  static constexpr int64_t kQ8Bias = 0;  // dot_bytes takes the 128 off before it multiplies
  static constexpr int64_t kQ4Bias = kQ4Offset;
  static constexpr bool kJoinsTerms = false;
  using F = float32x4_t;
  using I = int32x4_t;

  static F zero() { return vdupq_n_f32(0); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static F load(const float* p, int64_t n) {
    float lane[4] = {};
    __builtin_memcpy(lane, p, static_cast<size_t>(n) * sizeof(float));
    return vld1q_f32(lane);
  }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static void store(float* p, F x, int64_t n) {
    float lane[4];
    vst1q_f32(lane, x);
    __builtin_memcpy(p, lane, static_cast<size_t>(n) * sizeof(float));
  }
  template <int kCount>
  static F load_first(const float* p) {
    static_assert(kCount == 4);
    return vld1q_f32(p);
  }
  template <int kCount>
  static void store_first(float* p, F x) {
    static_assert(kCount == 4);
    vst1q_f32(p, x);
  }
  static F load_f16(const uint16_t* p) { return widen_f16(vld1_u16(p)); }
  static F load_f16(const uint16_t* p, int64_t n) { return widen_f16(load_halves(p, n)); }
  static F load_bf16(const uint16_t* p) { return widen_bf16(vld1_u16(p)); }
  static F load_bf16(const uint16_t* p, int64_t n) { return widen_bf16(load_halves(p, n)); }
  static void store_f16(uint16_t* p, F x, int64_t n) {
    uint16_t lane[4];
    vst1_u16(lane, vreinterpret_u16_f16(vcvt_f16_f32(x)));
    __builtin_memcpy(p, lane, static_cast<size_t>(n) * sizeof(uint16_t));
  }

  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }  // NaN where either is
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F round(F a) { return vrndnq_f32(a); }
  static F keep_first(F x, int64_t n) {
    const uint32_t lane[4] = {0, 1, 2, 3};
    const uint32x4_t keep = vcltq_u32(vld1q_u32(lane), vdupq_n_u32(static_cast<uint32_t>(n)));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), keep));
  }

  // a * 2^n in two steps, since 2^n alone may be no normal number; |n| <= 250.
  static F scale_by_power(F a, F n) {
    const I whole = vcvtnq_s32_f32(n);
    const I half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(a, power(half)), power(vsubq_s32(whole, half)));
  }

  // The sum of the lanes, always in this order: pairs of neighbours, then the pairs.
  static float sum(F x) {
    const F pairs = vpaddq_f32(x, x);
    return vgetq_lane_f32(vpaddq_f32(pairs, pairs), 0);
  }
  // Four sums, each in the order of sum().
  static void sum4(const F* x, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
  }

  template <int kCount>
  static I load_bytes(const std::byte* p) {
    static_assert(kCount == 16 || kCount == 8);
    if constexpr (kCount == 8) {
      return vreinterpretq_s32_u8(vcombine_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p)), vdup_n_u8(0)));
    }
    return vreinterpretq_s32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
  }
  static I low_nibbles(I x) { return vandq_s32(x, vdupq_n_s32(0x0f0f0f0f)); }
  static I high_nibbles(I x) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)); }
  static I bit_pairs(I x, int plane) {
    const uint8x16_t shifted = vshlq_u8(vreinterpretq_u8_s32(x), vdupq_n_s8(static_cast<int8_t>(-2 * plane)));
    return vreinterpretq_s32_u8(vandq_u8(shifted, vdupq_n_u8(3)));
  }
  static I dot_nibbles(I sum, I w, I q) { return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(q)); }
  static I dot_bytes(I sum, I w, I q) {
    return dot_nibbles(sum, veorq_s32(w, vdupq_n_s32(static_cast<int32_t>(0x80808080u))), q);
  }
  static F to_float(I x) { return vcvtq_f32_s32(x); }
  static I no_sum() { return vdupq_n_s32(0); }
  template <int kCount>
  static void store_ints(int32_t* p, I x) {
    static_assert(kCount == 4);
    vst1q_s32(p, x);
  }
  // Unsigned, as the other instruction sets wrap: before a sum's offset is taken back it may be past int32.
  static I add_ints(I a, I b) {
    return vreinterpretq_s32_u32(vaddq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
  }

  // Dwords as pairs of int16: the sum of both products, the low and the high words of a and b side by side, and bits
  // of each word.
  static I dot_words(I sum, I a, I b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return add_ints(sum, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
  }
  static I ones() { return vreinterpretq_s32_s16(vdupq_n_s16(1)); }
  static I pair_low(I a, I b) {
    return vreinterpretq_s32_s16(vtrn1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
  }
  static I pair_high(I a, I b) {
    return vreinterpretq_s32_s16(vtrn2q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
  }
  template <int kShift, int kMask>
  static I words(I x) {
    uint16x8_t shifted = vreinterpretq_u16_s32(x);
    if constexpr (kShift > 0) shifted = vshrq_n_u16(shifted, kShift);
    return vreinterpretq_s32_u16(vandq_u16(shifted, vdupq_n_u16(kMask)));
  }
  static I to_int(F x) { return vcvtnq_s32_f32(x); }  // to nearest even

  static I shifted_negative(I x, int bits) { return vnegq_s32(vshlq_s32(x, vdupq_n_s32(bits))); }
  // The first kCount numbers; the rest is zero.
  template <int kCount>
  static I load_ints(const int32_t* p) {
    if constexpr (kCount >= 4) return vld1q_s32(p);
    if constexpr (kCount == 2) return vcombine_s32(vld1_s32(p), vdup_n_s32(0));
    return vsetq_lane_s32(*p, vdupq_n_s32(0), 0);
  }

  // kCount scales, repeated over the lanes.
  template <int kCount>
  static F repeat(const float* p) {
    if constexpr (kCount >= 4) return vld1q_f32(p);
    if constexpr (kCount == 2) return vcombine_f32(vld1_f32(p), vld1_f32(p));
    return vdupq_n_f32(*p);
  }
  template <int kCount>
  static F repeat_f16(const std::byte* p) {
    static_assert(kCount == 4 || kCount == 2 || kCount == 1);
    uint16_t half[4];
    for (int i = 0; i < 4; i += kCount) __builtin_memcpy(half + i, p, kCount * sizeof(uint16_t));
    return load_f16(half);
  }

  // The bits kMask of each dword, less kOffset: they become the last bits of a float of 2^23.
  template <int32_t kMask, int32_t kOffset>
  static F field(I dwords) {
    const I mixed = vorrq_s32(vandq_s32(dwords, vdupq_n_s32(kMask)), vdupq_n_s32(0x4b000000));
    return vsubq_f32(vreinterpretq_f32_s32(mixed), vdupq_n_f32(0x1p23f + static_cast<float>(kOffset)));
  }
  template <int kBits>
  static I shift_right(I x) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), kBits));
  }

  static void transpose(F (&r)[4]) {
    const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
    for (int i = 0; i < 2; ++i) {
      r[i] = vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i]));
      r[i + 2] = vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i]));
    }
  }

  // 32 floats to bytes by x * inverse; returns the sum of the bytes.
  static int32_t round_block(const float* x, float inverse, int8_t* q) {
    I total = no_sum();
    for (int i = 0; i < kBlock; i += 8) {
      const I low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
      const I high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
      vst1_s8(q + i, vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high))));
      total = vaddq_s32(total, vaddq_s32(low, high));
    }
    return vaddvq_s32(total);
  }
  // The largest magnitude of 32 floats, as bits: a NaN is larger than everything.
  static uint32_t largest_bits(const float* x) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int i = 0; i < kBlock; i += 4) {
      const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + i));
      largest = vmaxq_u32(largest, vandq_u32(bits, vdupq_n_u32(0x7fffffffu)));
    }
    return vmaxvq_u32(largest);
  }

  // Writes the indices of up to 4 positive x; returns how many.
  static int64_t positive(const float* x, int64_t n, int64_t base, int32_t* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] > 0) out[count++] = static_cast<int32_t>(base + i);
    }
    return count;
  }

 private:
  static F widen_f16(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
  static F widen_bf16(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
  static uint16x4_t load_halves(const uint16_t* p, int64_t n) {
    uint16_t lane[4] = {};
    __builtin_memcpy(lane, p, static_cast<size_t>(n) * sizeof(uint16_t));
    return vld1_u16(lane);
  }
  static F power(I n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
};

}  // namespace

constinit const Kernels kNeonKernels = simd_table<Neon>();

}  // namespace turbosparse

#endif
