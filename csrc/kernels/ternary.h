// SPDX-License-Identifier: Apache-2.0
// Rows of three values: found among rows of q4_0 or q8_0, and packed with 2 bits a weight instead of 4.5 or 8.5.
//
// Gates that were trained that way (relufy/ternary.py) come in files of any program's types, with the same quant, say 7
// or 127, as +s everywhere. What they are is seen when they are loaded.
#pragma once

#include "kernels.h"

namespace turbosparse {

// Whether each row of `source`, in ggml's layout of q4_0 or q8_0, holds only -q, 0 and q, one q and one scale a row.
bool is_ternary(WeightType from, int64_t rows, int64_t cols, const std::byte* source);

// Packs rows [first, last) of `into`, a matrix of type ternary, from rows that is_ternary holds of.
void pack_ternary(const Matrix& into, std::byte* storage, int64_t first, int64_t last, WeightType from,
                  const std::byte* source);

}  // namespace turbosparse
