// SPDX-License-Identifier: Apache-2.0
// The tables that were compiled in. They are constants: naming one runs no code of its instruction set.
// TURBOSPARSE_AVXVNNI comes from the build: older compilers do not know the instructions.
#pragma once

#include "kernels.h"

#if defined(__x86_64__) && !defined(_MSC_VER)
#define TURBOSPARSE_X86 1
#elif defined(__aarch64__) && !defined(_MSC_VER)
#define TURBOSPARSE_ARM 1
#endif

namespace turbosparse {

extern const Kernels kGenericKernels;
#ifdef TURBOSPARSE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
#endif
#ifdef TURBOSPARSE_ARM
extern const Kernels kNeonKernels;
#endif

}  // namespace turbosparse
