// SPDX-License-Identifier: Apache-2.0
// The int16 levels of coefficients, which all instruction sets share: level = round(coefficient * scale of the weight's
// block / scale of the sum). The largest level that can occur is kept below 2^15, and so small that no sum of `most`
// rows leaves int32: with up to 7168 rows of q4_0 or 448 of q8_0 the first is what counts.
//
// What is declared here is compiled once, for every machine (see pack.h).
#pragma once

#include "pack.h"

namespace turbosparse {

struct Levels {
  enum Kind { none, integers, floats };  // floats: something is no finite number, which fp32 shows in the result
  Kind kind;
  float scale;    // of the sum
  float inverse;  // level = coefficient * inverse * scale of the block
};

// For a sum over n listed rows of at most `most`.
Levels levels_for(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, int64_t most);

[[maybe_unused]] static float factor_of(const Levels& levels, const Matrix& w, int64_t row, float coefficient) {
  return w.largest[row] > 0 ? coefficient * levels.inverse : 0.0f;
}

// What sums over rows [first, last) for `count` vectors need; the vectors are filled up to a multiple of `step` with
// such as add nothing.
struct RowSums {
  RowSums(const Matrix& w, int64_t first, int64_t last, const float* coefficient, int64_t stride, int64_t count,
          int64_t step);
  ~RowSums();
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  int64_t vectors;     // `count`, filled up
  float* factor;       // [vectors, last - first + 1], the last of each is zero
  float* scale;        // [vectors]; 0: it adds nothing here
  int32_t* every;      // first, first + 1 ...
  int32_t* in_floats;  // vectors that have to be summed in fp32
  int64_t n_in_floats = 0;
  int32_t* lanes;   // [vectors, columns of a group]: room for the sums of a group
  int32_t* levels;  // [vectors, blocks of a group]: and for those of its levels
};

}  // namespace turbosparse
