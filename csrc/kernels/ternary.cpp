// SPDX-License-Identifier: Apache-2.0
#include "ternary.h"

#include <cstdlib>
#include <cstring>

#include "pack.h"

namespace turbosparse {
namespace {

// A row in ggml's layout, block by block.
struct SourceRow {
  WeightType from;
  const std::byte* blocks;

  const std::byte* block(int64_t index) const { return blocks + index * scaled_block_bytes(from); }
  uint16_t scale(int64_t index) const {
    uint16_t half;
    std::memcpy(&half, block(index), sizeof(half));
    return half;
  }
  int quant(int64_t index, int64_t column) const {
    const std::byte* quants = block(index) + scale_bytes(from);
    if (from == WeightType::q8_0) return static_cast<int8_t>(quants[column]);
    const int byte = std::to_integer<int>(quants[column % (kBlock / 2)]);
    return (column < kBlock / 2 ? byte & 15 : byte >> 4) - static_cast<int>(kQ4Offset);
  }
};

struct ThreeValues {
  int quant = 0;       // of +s or -s; 0 in a row of zeros
  uint16_t scale = 0;  // float16
  bool hold = true;    // there are no others
};

ThreeValues values_of(const SourceRow& row, int64_t blocks) {
  ThreeValues found;
  for (int64_t b = 0; b < blocks; ++b) {
    if ((row.scale(b) & 0x7c00u) == 0x7c00u) return {.hold = false};  // no number: it must show in every product
    for (int64_t c = 0; c < kBlock; ++c) {
      const int quant = std::abs(row.quant(b, c));
      if (quant == 0) continue;
      if (found.quant == 0) found = {.quant = quant, .scale = row.scale(b)};
      if (quant != found.quant || row.scale(b) != found.scale) return {.hold = false};
    }
  }
  return found;
}

// The dword of columns 4 d to 4 d + 3 of a block and of those 8, 16 and 24 further.
uint32_t dword_of(const SourceRow& row, int64_t block, int64_t d) {
  uint32_t dword = 0;
  for (int64_t k = 0; k < 4; ++k) {
    for (int64_t plane = 0; plane < 4; ++plane) {
      const int quant = row.quant(block, 8 * plane + 4 * d + k);
      const int level = (quant > 0) - (quant < 0) + static_cast<int>(kTernaryOffset);
      dword |= static_cast<uint32_t>(level) << (8 * k + 2 * plane);
    }
  }
  return dword;
}

void pack_row(const SourceRow& row, int64_t blocks, std::byte* out) {
  const ThreeValues values = values_of(row, blocks);
  const float magnitude = f16_magnitude(values.scale & 0x7fffu) * static_cast<float>(values.quant);
  const float scale = values.scale & 0x8000u ? -magnitude : magnitude;
  std::memcpy(out, &scale, sizeof(scale));
  out += head_bytes(WeightType::ternary);
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    for (int64_t b = 0; b < group; ++b) {
      for (int64_t d = 0; d < block_bytes(WeightType::ternary) / 4; ++d) {
        const uint32_t dword = dword_of(row, begin + b, d);
        std::memcpy(out + byte_in_group(group, b, 4 * d), &dword, sizeof(dword));
      }
    }
    out += group * block_bytes(WeightType::ternary);
    begin += group;
  }
}

}  // namespace

bool is_ternary(WeightType from, int64_t rows, int64_t cols, const std::byte* source) {
  const int64_t blocks = cols / kBlock;
  for (int64_t r = 0; r < rows; ++r) {
    if (!values_of({from, source + r * blocks * scaled_block_bytes(from)}, blocks).hold) return false;
  }
  return true;
}

void pack_ternary(const Matrix& into, std::byte* storage, int64_t first, int64_t last, WeightType from,
                  const std::byte* source) {
  const int64_t blocks = into.cols / kBlock;
  for (int64_t r = first; r < last; ++r) {
    pack_row({from, source}, blocks, storage + r * into.row_bytes);
    source += blocks * scaled_block_bytes(from);
  }
}

}  // namespace turbosparse
