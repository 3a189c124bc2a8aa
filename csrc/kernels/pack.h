// SPDX-License-Identifier: Apache-2.0
// The layout of packed matrices, which all instruction sets share.
//
// Rows of f32, f16 and bf16 are kept as they are. Rows of q4_0 and q8_0 are cut into groups of 16 blocks, and what is
// left into groups of 8, 4, 2 and 1 (576 columns are 18 blocks: 16 + 2). A group begins with the float16 scales of its
// blocks. A block's bytes, 16 of q4_0 or 32 of q8_0, are 4 or 8 dwords; after the scales come the first dword of each
// of the blocks, then the second of each, and so on:
//
//     dword d of block b of a group of g lies at 4 * (d * g + b) behind the scales
//
// A row of ternary begins with its one scale, a float; its groups have no other. A block is 8 bytes, 2 dwords.
//
// Everything is read in the order in which it lies: with the scales elsewhere, a stream of its own in the same pages
// took a third of the speed of reading from memory.
//
// So a 64-byte load gives 16 blocks one dword each, integer dot products sum four columns inside a dword, and a lane
// meets one block only: all dwords of a block add up in its lane, and one multiplication with the vector of 16 block
// scales ends the group. In a group of g < 16 blocks, lane l belongs to block l % g. Quantised activations have the
// same order.
//
// q4_0 keeps ggml's nibbles: byte i of a block holds column i in its low half and column 16 + i in its high half, with
// 8 added. Byte i of a ternary block holds columns i, 8 + i, 16 + i and 24 + i, lowest bits first, with 1 added. q8_0
// gets 128 added, since integer dot products multiply an unsigned with a signed byte.
#pragma once

#include "kernels.h"

namespace turbosparse {

inline constexpr int64_t kGroup = 16;  // blocks
inline constexpr int64_t kQ4Offset = 8;
inline constexpr int64_t kQ8Offset = 128;
inline constexpr int64_t kTernaryOffset = 1;

int64_t packed_bytes(WeightType type, int64_t rows, int64_t cols);
Matrix layout(WeightType type, int64_t rows, int64_t cols, const std::byte* storage);
void pack(const Matrix& into, std::byte* storage, int64_t first, int64_t last, const std::byte* source);
void largest_scales(const Matrix& w, int64_t first, int64_t last, float* out);
float f16_magnitude(uint16_t bits);  // of a float16 without its sign; infinity for what is no number

// The functions below have internal linkage: each instruction set compiles its own copy, and no linker can hand the
// generic kernels one that was compiled for a larger machine.

static constexpr bool is_blocked(WeightType type) {
  return type == WeightType::q4_0 || type == WeightType::q8_0 || type == WeightType::ternary;
}

// Bytes before the first group of a row, and of a block's scale, a float16.
static constexpr int64_t head_bytes(WeightType type) { return type == WeightType::ternary ? 4 : 0; }
static constexpr int64_t scale_bytes(WeightType type) { return type == WeightType::ternary ? 0 : 2; }

// Bytes of 32 columns of a blocked type without their scale, and with it.
static constexpr int64_t block_bytes(WeightType type) {
  return type == WeightType::ternary ? kBlock / 4 : type == WeightType::q4_0 ? kBlock / 2 : kBlock;
}
static constexpr int64_t scaled_block_bytes(WeightType type) { return scale_bytes(type) + block_bytes(type); }

// Blocks of the group that begins where `left` blocks of the row are left: 16, or the largest power of two that fits.
[[maybe_unused]] static constexpr int64_t group_size(int64_t left) {
  for (int64_t size = kGroup; size > 1; size /= 2) {
    if (left >= size) return size;
  }
  return 1;
}

// Where byte `byte` of block `block` lies in a group of `group` blocks, behind their scales.
[[maybe_unused]] static constexpr int64_t byte_in_group(int64_t group, int64_t block, int64_t byte) {
  return 4 * (byte / 4 * group + block) + byte % 4;
}

}  // namespace turbosparse
