// SPDX-License-Identifier: Apache-2.0
// The tables that were compiled in. They are constants: naming one runs no code of its instruction set.
#pragma once

#include "kernels.h"

#if defined(__x86_64__) && !defined(_MSC_VER)
#define TURBOSPARSE_X86 1
#endif

namespace turbosparse {

extern const Kernels kGenericKernels;
#ifdef TURBOSPARSE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace turbosparse
