// SPDX-License-Identifier: Apache-2.0
// AVX2 with AVX-VNNI: sums of four byte products in one instruction, as on processors that have no AVX-512.
#include "isa.h"

#ifdef TURBOSPARSE_AVXVNNI

#include "avx2.h"
#include "simd_table.h"

namespace turbosparse {
namespace {

struct AvxVnni : Avx2 {
  static constexpr const char* kIsa = "avxvnni";
  static constexpr int64_t kQ8Bias = kQ8Offset;  // the unsigned byte is multiplied as stored; `sum` takes its 128 back
  static constexpr bool kJoinsTerms = false;

  static I dot_nibbles(I sum, I w, I q) { return _mm256_dpbusd_avx_epi32(sum, w, q); }
  static I dot_bytes(I sum, I w, I q) { return _mm256_dpbusd_avx_epi32(sum, w, q); }
};

}  // namespace

constinit const Kernels kAvxVnniKernels = simd_table<AvxVnni>();

}  // namespace turbosparse

#endif
