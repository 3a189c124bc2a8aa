// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#ifdef TURBOSPARSE_X86

#include "avx2.h"
#include "simd_table.h"

namespace turbosparse {

constinit const Kernels kAvx2Kernels = simd_table<Avx2>();

}  // namespace turbosparse

#endif
