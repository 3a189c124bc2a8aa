// SPDX-License-Identifier: Apache-2.0
// Which tables this machine can run: asked of the processor and the operating system, of nothing else.
#include "isa.h"

#ifdef TURBOSPARSE_X86
#include <cpuid.h>
#endif
#if defined(TURBOSPARSE_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace turbosparse {
namespace {

#ifdef TURBOSPARSE_AVXVNNI
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#ifdef TURBOSPARSE_ARM
bool has_dot_product() {
#ifdef __linux__
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct;
#else
  return true;  // every Apple processor since the M1
#endif
}
#endif

struct Available {
  const Kernels* tables[4] = {};
  int count = 0;

  Available() {
#ifdef TURBOSPARSE_X86
    // The compiler's run time reads cpuid and, for YMM and ZMM registers, whether the system saves them (XCR0).
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512) tables[count++] = &kAvx512Kernels;
#ifdef TURBOSPARSE_AVXVNNI
    if (avx2 && has_avxvnni()) tables[count++] = &kAvxVnniKernels;
#endif
    if (avx2) tables[count++] = &kAvx2Kernels;
#endif
#ifdef TURBOSPARSE_ARM
    if (has_dot_product()) tables[count++] = &kNeonKernels;
#endif
    tables[count++] = &kGenericKernels;
  }
};

}  // namespace

const Kernels* const* available_kernels(int* count) {
  static const Available available;
  *count = available.count;
  return available.tables;
}

}  // namespace turbosparse
