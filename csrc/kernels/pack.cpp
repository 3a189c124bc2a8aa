// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

namespace turbosparse {
namespace {

constexpr int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int64_t row_bytes(WeightType type, int64_t cols) {
  if (is_blocked(type)) return head_bytes(type) + cols / kBlock * scaled_block_bytes(type);
  return cols * (type == WeightType::f32 ? 4 : 2);
}

// ggml's block: a float16 scale, then the quants.
template <WeightType kType>
void pack_row(int64_t blocks, const std::byte* source, std::byte* row) {
  constexpr int64_t kBytes = block_bytes(kType), kScaleBytes = scale_bytes(kType);
  constexpr uint32_t kFlip = kType == WeightType::q8_0 ? 0x80808080 : 0;  // adds 128 to each of four signed bytes
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    std::byte* scales = row + begin * scaled_block_bytes(kType);
    std::byte* out = scales + group * kScaleBytes;
    for (int64_t b = 0; b < group; ++b) {
      const std::byte* block = source + (begin + b) * scaled_block_bytes(kType);
      std::memcpy(scales + b * kScaleBytes, block, kScaleBytes);
      for (int64_t i = 0; i < kBytes; i += 4) {
        uint32_t dword;
        std::memcpy(&dword, block + kScaleBytes + i, 4);
        dword ^= kFlip;
        std::memcpy(out + byte_in_group(group, b, i), &dword, 4);
      }
    }
    begin += group;
  }
}

}  // namespace

float f16_magnitude(uint16_t bits) {
  if (bits >= 0x7c00u) return std::numeric_limits<float>::infinity();  // or a NaN
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 13) * 0x1p112f;
}

int64_t packed_bytes(WeightType type, int64_t rows, int64_t cols) { return align(rows * row_bytes(type, cols)); }

Matrix layout(WeightType type, int64_t rows, int64_t cols, const std::byte* storage) {
  return Matrix{.type = type, .rows = rows, .cols = cols, .values = storage, .row_bytes = row_bytes(type, cols)};
}

void pack(const Matrix& into, std::byte* storage, int64_t first, int64_t last, const std::byte* source) {
  std::byte* row = storage + first * into.row_bytes;
  if (!is_blocked(into.type)) {
    std::memcpy(row, source, static_cast<size_t>((last - first) * into.row_bytes));
    return;
  }
  const auto pack_row_of = into.type == WeightType::q4_0 ? pack_row<WeightType::q4_0> : pack_row<WeightType::q8_0>;
  for (int64_t r = first; r < last; ++r) {
    pack_row_of(into.cols / kBlock, source, row);
    source += into.row_bytes;  // ggml's blocks hold their scales: as many bytes
    row += into.row_bytes;
  }
}

void largest_scales(const Matrix& w, int64_t first, int64_t last, float* out) {
  const int64_t blocks = w.cols / kBlock;
  for (int64_t r = first; r < last; ++r) {
    uint16_t largest = 0;
    for (int64_t begin = 0; begin < blocks;) {
      const int64_t group = group_size(blocks - begin);
      const std::byte* scales = w.values + r * w.row_bytes + begin * scaled_block_bytes(w.type);
      for (int64_t b = 0; b < group; ++b) {
        uint16_t half;
        std::memcpy(&half, scales + b * sizeof(half), sizeof(half));
        largest = std::max<uint16_t>(largest, half & 0x7fffu);  // magnitudes are ordered as their bits are
      }
      begin += group;
    }
    out[r] = f16_magnitude(largest);
  }
}

}  // namespace turbosparse
