// SPDX-License-Identifier: Apache-2.0
// A coarse copy of a matrix that says of every product with a vector what it cannot exceed.
//
// The next token is the row of the head with the largest logit, noised or not: so most logits need not be known, only
// that they are too small. The sketch is each row S_r of the matrix rounded to q4_0, and a bound on what that lost:
//
//     |<W_r, x> - <S_r, x>|  <=  bound_r * length(x)
//
// by the inequality of Cauchy and Schwarz, with bound_r about |(W_r - S_r) m| and length(x) about |x / m|. The weights
// m of the columns may be any; with the square roots of what vectors usually have there, large columns of x, which are
// few and always the same, cost no more than others. The bound holds for the products that the kernels compute, not
// only for those of real numbers: both are sums of int8 block products in fp32.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "team.h"

namespace turbosparse {

class Sketch {
 public:
  // Whether a sketch of such a matrix reads much less than the matrix.
  static bool pays(const Kernels& kernels, const Matrix& w);

  // squares [cols]: of vectors that the matrix was multiplied with, added up.
  Sketch(const Kernels& kernels, const Matrix& w, const std::vector<double>& squares, Team& team);

  const Matrix& matrix() const { return view_; }
  const float* bounds() const { return bounds_.data(); }  // [rows]
  // What a vector is multiplied with: int8 blocks, with a rest where the rows of the matrix have no blocks themselves.
  float length(const Vectors& x) const;
  // No product of a row of either is more than that times the length; infinite where a row holds what is no number.
  float largest() const { return largest_; }
  size_t bytes() const { return storage_.size() + bounds_.size() * sizeof(float); }

 private:
  // Rows [first, last); returns what no product is more than.
  float fill(const Kernels& kernels, const Matrix& w, int64_t first, int64_t last);

  Mapping storage_;
  Matrix view_;
  std::vector<float> weights_;  // [cols], each at least 1
  double most_weight_ = 1;
  std::vector<float> bounds_;
  float largest_ = 0;
};

}  // namespace turbosparse
