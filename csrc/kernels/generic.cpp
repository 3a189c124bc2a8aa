// SPDX-License-Identifier: Apache-2.0
// Every kernel in plain C++: runs anywhere, and says what the others must compute.
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "isa.h"
#include "pack.h"
#include "sums.h"

namespace turbosparse {
namespace {

float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into a float's fields the number is 2^-112 of its value, subnormal or not; the product is exact.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | static_cast<uint16_t>((magnitude >> 13) & 0x1ffu);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts one ulp at 2^-24 and rounds to even
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f));
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>(rounded >> 13);
}

template <class T>
T read(const std::byte* from, int64_t index) {
  T value;
  std::memcpy(&value, from + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float plain_value(WeightType type, const std::byte* row, int64_t c) {
  if (type == WeightType::f32) return read<float>(row, c);
  const auto half = read<uint16_t>(row, c);
  return type == WeightType::f16 ? f16_to_f32(half) : std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
}

struct Group {
  int64_t begin;  // first block
  int64_t size;   // blocks
};

Group group_of(int64_t block, int64_t blocks) {
  Group group{block / kGroup * kGroup, 0};
  group.size = group_size(blocks - group.begin);
  while (block >= group.begin + group.size) {
    group.begin += group.size;
    group.size = group_size(blocks - group.begin);
  }
  return group;
}

// The quants of block `block` of a row, in the order of columns.
void decode_block(WeightType type, const std::byte* row, int64_t blocks, int64_t block, int32_t* q) {
  const Group group = group_of(block, blocks);
  const std::byte* values =
      row + head_bytes(type) + group.begin * scaled_block_bytes(type) + group.size * scale_bytes(type);
  for (int64_t i = 0; i < block_bytes(type); ++i) {
    const int32_t byte = std::to_integer<int32_t>(values[byte_in_group(group.size, block - group.begin, i)]);
    if (type == WeightType::q8_0) {
      q[i] = byte - static_cast<int32_t>(kQ8Offset);
    } else if (type == WeightType::ternary) {
      for (int64_t plane = 0; plane < 4; ++plane) {
        q[i + 8 * plane] = ((byte >> 2 * plane) & 3) - static_cast<int32_t>(kTernaryOffset);
      }
    } else {
      q[i] = (byte & 15) - static_cast<int32_t>(kQ4Offset);
      q[i + kBlock / 2] = (byte >> 4) - static_cast<int32_t>(kQ4Offset);
    }
  }
}

float block_scale(WeightType type, const std::byte* row, int64_t blocks, int64_t block) {
  if (type == WeightType::ternary) return read<float>(row, 0);
  const Group group = group_of(block, blocks);
  return f16_to_f32(read<uint16_t>(row + group.begin * scaled_block_bytes(type), block - group.begin));
}

// Calls visit(block, scale, quants) for each block of a row in turn.
template <class Visit>
void for_each_block(const Matrix& w, int64_t row, Visit visit) {
  const std::byte* values = w.values + row * w.row_bytes;
  const int64_t blocks = w.cols / kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    int32_t quants[kBlock];
    decode_block(w.type, values, blocks, block, quants);
    visit(block, block_scale(w.type, values, blocks, block), quants);
  }
}

// The activations' quants are laid out as those of a q8_0 row, without its offset.
int32_t integer_dot(const int32_t* w, const int8_t* q, int64_t blocks, int64_t block) {
  const Group group = group_of(block, blocks);
  const int8_t* values = q + group.begin * kBlock;
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) sum += w[i] * values[byte_in_group(group.size, block - group.begin, i)];
  return sum;
}

float dot_blocked(const Matrix& w, int64_t row, const Vectors& x, int64_t v) {
  const int64_t blocks = w.cols / kBlock;
  float total = 0;
  for_each_block(w, row, [&](int64_t block, float scale, const int32_t* quants) {
    for (const Vectors* term = x.q ? &x : nullptr; term; term = term->rest) {
      const int32_t sum = integer_dot(quants, term->q + v * x.cols, blocks, block);
      total += static_cast<float>(sum) * (scale * term->scale[v * blocks + block]);
    }
    if (x.q) return;
    const float* values = x.x + v * x.cols + block * kBlock;
    for (int64_t i = 0; i < kBlock; ++i) total += scale * static_cast<float>(quants[i]) * values[i];
  });
  return total;
}

float dot_row(const Matrix& w, int64_t row, const Vectors& x, int64_t v) {
  if (is_blocked(w.type)) return dot_blocked(w, row, x, v);
  const std::byte* values = w.values + row * w.row_bytes;
  float total = 0;
  for (int64_t c = 0; c < w.cols; ++c) total += plain_value(w.type, values, c) * x.x[v * x.cols + c];
  return total;
}

void dot(const Matrix& w, int64_t first, int64_t last, const Vectors& x, float* out, int64_t out_stride) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t v = 0; v < x.count; ++v) out[v * out_stride + row] = dot_row(w, row, x, v);
  }
}

void dot_listed(const Matrix& w, const int32_t* rows, int64_t n, const Vectors& x, int64_t v, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot_row(w, rows[i], x, v);
}

void axpy_row(const Matrix& w, int64_t row, float coefficient, float* y) {
  if (!is_blocked(w.type)) {
    const std::byte* values = w.values + row * w.row_bytes;
    for (int64_t c = 0; c < w.cols; ++c) y[c] += coefficient * plain_value(w.type, values, c);
    return;
  }
  for_each_block(w, row, [&](int64_t block, float scale, const int32_t* quants) {
    const float factor = coefficient * scale;
    for (int64_t i = 0; i < kBlock; ++i) y[block * kBlock + i] += factor * static_cast<float>(quants[i]);
  });
}

void axpy_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) axpy_row(w, rows[i], coefficient[i], y);
}

void sum_listed(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, int64_t most, float* y) {
  const Levels levels = levels_for(w, rows, coefficient, n, most);
  if (levels.kind == Levels::none) return;
  if (levels.kind == Levels::floats) return axpy_listed(w, rows, coefficient, n, y);
  std::vector<int32_t> sums(static_cast<size_t>(w.cols));
  for (int64_t i = 0; i < n; ++i) {
    const float factor = factor_of(levels, w, rows[i], coefficient[i]);
    for_each_block(w, rows[i], [&](int64_t block, float scale, const int32_t* quants) {
      const auto level = static_cast<int32_t>(std::nearbyint(factor * scale));
      for (int64_t c = 0; c < kBlock; ++c) sums[block * kBlock + c] += level * quants[c];
    });
  }
  for (int64_t c = 0; c < w.cols; ++c) y[c] += levels.scale * static_cast<float>(sums[c]);
}

void sum_rows(const Matrix& w, int64_t first, int64_t last, const float* coefficient, int64_t stride, int64_t count,
              float* y, int64_t y_stride) {
  std::vector<int32_t> every(static_cast<size_t>(last - first));
  std::iota(every.begin(), every.end(), static_cast<int32_t>(first));
  for (int64_t v = 0; v < count; ++v) {
    sum_listed(w, every.data(), coefficient + v * stride, last - first, last - first, y + v * y_stride);
  }
}

void decode_row(const Matrix& w, int64_t row, float* out) {
  if (!is_blocked(w.type)) {
    const std::byte* values = w.values + row * w.row_bytes;
    for (int64_t c = 0; c < w.cols; ++c) out[c] = plain_value(w.type, values, c);
    return;
  }
  for_each_block(w, row, [&](int64_t block, float scale, const int32_t* quants) {
    for (int64_t i = 0; i < kBlock; ++i) out[block * kBlock + i] = scale * static_cast<float>(quants[i]);
  });
}

// The scale of a block and its inverse. Blocks too small for a normal scale count as zero.
void block_scales(const float* x, float* scale, float* inverse) {
  uint32_t largest = 0;  // compared as bits, so that a NaN is larger than everything
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    if (bits > largest) largest = bits;
  }
  const float amplitude = std::bit_cast<float>(largest);
  *scale = 0;
  *inverse = 0;
  if (largest >= 0x7f800000u) {
    *scale = std::bit_cast<float>(0x7fc00000u);
  } else if (amplitude >= 0x1p-100f) {
    *scale = amplitude / 127.0f;
    *inverse = 127.0f / amplitude;
  }
}

void quantize(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum) {
  const int64_t blocks = n / kBlock;
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    for (int64_t b = 0; b < group; ++b) {
      const int64_t block = begin + b;
      float inverse;
      block_scales(x + block * kBlock, scale + block, &inverse);
      sum[block] = 0;
      for (int64_t i = 0; i < kBlock; ++i) {
        const float value = inverse == 0 ? 0 : std::nearbyint(x[block * kBlock + i] * inverse);
        q[begin * kBlock + byte_in_group(group, b, i)] = static_cast<int8_t>(value);
        sum[block] += static_cast<int32_t>(value);
      }
    }
    begin += group;
  }
}

int64_t positive(const float* x, int64_t n, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] > 0) out[count++] = static_cast<int32_t>(i);
  }
  return count;
}

void to_f16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

float maximum(const float* x, int64_t n) {
  float highest = -INFINITY;
  for (int64_t i = 0; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

float exp_sum(float* x, int64_t n, float max) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - max);
    total += x[i];
  }
  return total;
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  float squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void swiglu(const float* gate, const float* up, int64_t n, float* h) {
  for (int64_t i = 0; i < n; ++i) h[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// gelu_tanh(g) = g / 2 (1 + tanh u) = g / (1 + exp(-2u)), u = sqrt(2 / pi) (g + 0.044715 g^3).
void geglu(const float* gate, const float* up, int64_t n, float* h) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i];
    const float twice = 1.5957691216057308f * g * (1.0f + 0.044715f * g * g);
    h[i] = g / (1.0f + std::exp(-twice)) * up[i];
  }
}

}  // namespace

const Kernels kGenericKernels = {
    .isa = "generic",
    .packed_bytes = packed_bytes,
    .layout = layout,
    .pack = pack,
    .largest_scales = largest_scales,
    .quantize = quantize,
    .dot = dot,
    .dot_listed = dot_listed,
    .axpy_listed = axpy_listed,
    .sum_listed = sum_listed,
    .sum_rows = sum_rows,
    .decode_row = decode_row,
    .positive = positive,
    .to_f16 = to_f16,
    .exp_sum = exp_sum,
    .maximum = maximum,
    .rms_norm = rms_norm,
    .swiglu = swiglu,
    .geglu = geglu,
};

}  // namespace turbosparse
