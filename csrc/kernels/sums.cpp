// SPDX-License-Identifier: Apache-2.0
#include "sums.h"

#include <algorithm>
#include <bit>
#include <new>
#include <numeric>

namespace turbosparse {
namespace {

// The largest |coefficient * scale of a block|, as bits: a NaN is larger than everything.
uint32_t largest_bits(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(coefficient[i] * w.largest[rows[i]]) & 0x7fffffffu);
  }
  return largest;
}

constexpr std::align_val_t kLine{64};

int32_t* aligned_ints(int64_t n) {
  return static_cast<int32_t*>(::operator new(static_cast<size_t>(n) * sizeof(int32_t), kLine));
}

}  // namespace

Levels levels_for(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, int64_t most) {
  const uint32_t largest = largest_bits(w, rows, coefficient, n);
  const auto amplitude = std::bit_cast<float>(largest);
  if (largest >= 0x7f800000u) return {Levels::floats, 0, 0};
  if (amplitude < 0x1p-100f) return {Levels::none, 0, 0};
  const int64_t quant = w.type == WeightType::q4_0 ? kQ4Offset : kQ8Offset;
  const int64_t room = (int64_t{7} << 28) / (most * quant);  // 7/8 of 2^31: rounding adds to a level
  const auto limit = static_cast<float>(std::clamp<int64_t>(room, 1, 32767));
  return {Levels::integers, amplitude / limit, limit / amplitude};
}

RowSums::RowSums(const Matrix& w, int64_t first, int64_t last, const float* coefficient, int64_t stride, int64_t count,
                 int64_t step)
    : vectors((count + step - 1) / step * step) {
  const int64_t n = last - first;
  factor = new float[vectors * (n + 1)]();
  scale = new float[vectors]();
  every = new int32_t[n];
  in_floats = new int32_t[count];
  lanes = aligned_ints(vectors * kGroup * kBlock);
  levels = aligned_ints(vectors * kGroup);
  std::iota(every, every + n, static_cast<int32_t>(first));
  for (int64_t v = 0; v < count; ++v) {
    const float* of_vector = coefficient + v * stride;
    const Levels levels = levels_for(w, every, of_vector, n, n);
    if (levels.kind == Levels::floats) in_floats[n_in_floats++] = static_cast<int32_t>(v);
    if (levels.kind != Levels::integers) continue;
    scale[v] = levels.scale;
    for (int64_t i = 0; i < n; ++i) factor[v * (n + 1) + i] = factor_of(levels, w, every[i], of_vector[i]);
  }
}

RowSums::~RowSums() {
  delete[] factor;
  delete[] scale;
  delete[] every;
  delete[] in_floats;
  ::operator delete(lanes, kLine);
  ::operator delete(levels, kLine);
}

}  // namespace turbosparse
