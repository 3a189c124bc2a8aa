// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include <cstring>

namespace turbosparse {
namespace {

constexpr int64_t kScaleBytes = 2;  // float16

constexpr int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int64_t value_stride(WeightType type, int64_t cols) {
  if (is_blocked(type)) return cols / kBlock * block_bytes(type);
  return cols * (type == WeightType::f32 ? 4 : 2);
}

constexpr int64_t scale_stride(WeightType type, int64_t cols) {
  return is_blocked(type) ? cols / kBlock * kScaleBytes : 0;
}

// ggml's block: a float16 scale, then the quants.
void pack_row(WeightType type, int64_t blocks, const std::byte* source, std::byte* values, std::byte* scales) {
  const int64_t bytes = block_bytes(type);
  const std::byte flip = type == WeightType::q8_0 ? std::byte{0x80} : std::byte{0};  // adds 128 to a signed byte
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    std::byte* out = values + begin * bytes;
    for (int64_t b = 0; b < group; ++b) {
      const std::byte* block = source + (begin + b) * (kScaleBytes + bytes);
      std::memcpy(scales + (begin + b) * kScaleBytes, block, kScaleBytes);
      for (int64_t i = 0; i < bytes; ++i) out[byte_in_group(group, b, i)] = block[kScaleBytes + i] ^ flip;
    }
    begin += group;
  }
}

}  // namespace

int64_t packed_bytes(WeightType type, int64_t rows, int64_t cols) {
  return align(rows * value_stride(type, cols)) + align(rows * scale_stride(type, cols));
}

Matrix layout(WeightType type, int64_t rows, int64_t cols, const std::byte* storage) {
  Matrix matrix{.type = type, .rows = rows, .cols = cols, .values = storage};
  matrix.value_stride = value_stride(type, cols);
  matrix.scale_stride = scale_stride(type, cols);
  if (is_blocked(type)) matrix.scales = storage + align(rows * matrix.value_stride);
  return matrix;
}

void pack(const Matrix& into, std::byte* storage, int64_t first, int64_t last, const std::byte* source) {
  std::byte* values = storage + first * into.value_stride;
  if (!is_blocked(into.type)) {
    std::memcpy(values, source, static_cast<size_t>((last - first) * into.value_stride));
    return;
  }
  std::byte* scales = storage + (into.scales - into.values) + first * into.scale_stride;
  for (int64_t row = first; row < last; ++row) {
    pack_row(into.type, into.cols / kBlock, source, values, scales);
    source += into.row_bytes();
    values += into.value_stride;
    scales += into.scale_stride;
  }
}

}  // namespace turbosparse
