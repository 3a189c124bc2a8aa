// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include <cstring>

namespace turbosparse {
namespace {

constexpr int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int64_t row_bytes(WeightType type, int64_t cols) {
  if (is_blocked(type)) return cols / kBlock * scaled_block_bytes(type);
  return cols * (type == WeightType::f32 ? 4 : 2);
}

// ggml's block: a float16 scale, then the quants.
void pack_row(WeightType type, int64_t blocks, const std::byte* source, std::byte* row) {
  const int64_t bytes = block_bytes(type);
  const std::byte flip = type == WeightType::q8_0 ? std::byte{0x80} : std::byte{0};  // adds 128 to a signed byte
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    std::byte* scales = row + begin * scaled_block_bytes(type);
    std::byte* out = scales + group * kScaleBytes;
    for (int64_t b = 0; b < group; ++b) {
      const std::byte* block = source + (begin + b) * scaled_block_bytes(type);
      std::memcpy(scales + b * kScaleBytes, block, kScaleBytes);
      for (int64_t i = 0; i < bytes; ++i) out[byte_in_group(group, b, i)] = block[kScaleBytes + i] ^ flip;
    }
    begin += group;
  }
}

}  // namespace

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
  for (int64_t r = first; r < last; ++r) {
    pack_row(into.type, into.cols / kBlock, source, row);
    source += into.row_bytes;  // ggml's blocks hold their scales: as many bytes
    row += into.row_bytes;
  }
}

}  // namespace turbosparse
