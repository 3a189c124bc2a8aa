// SPDX-License-Identifier: Apache-2.0
// Which tables this machine can run: asked of the processor and the operating system, of nothing else.
#include "isa.h"

namespace turbosparse {
namespace {

struct Available {
  const Kernels* tables[3] = {};
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
    if (avx2) tables[count++] = &kAvx2Kernels;
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
