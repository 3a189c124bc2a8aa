// SPDX-License-Identifier: Apache-2.0
#include "sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/pack.h"

namespace turbosparse {
namespace {

constexpr double kLeastRatio = 1.5;     // of the bytes of a row to those of its sketch
constexpr int64_t kPiece = 64;          // rows that are made together
constexpr int64_t kSourceBytes = 18;    // of a block in ggml's own layout: a float16 scale and nibbles
constexpr double kInputLoss = 0x1p-13;  // of the length of a vector: what two int8 terms of it lose, or words for them
constexpr double kUp = 1 + 0x1p-16;     // over any rounding of the sums below
// Products of so small numbers may be off by more than their size says.
constexpr double kLeastBound = 0x1p-50, kLeastLength = 0x1p-70;

// The scale of a block of q4_0 with the largest |x| at -8, as ggml has it; 0 for what is too small for float16.
float scale_of(const float* x) {
  constexpr int64_t kLanes = 8;
  float low[kLanes] = {}, high[kLanes] = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      low[lane] = x[i + lane] < low[lane] ? x[i + lane] : low[lane];
      high[lane] = x[i + lane] > high[lane] ? x[i + lane] : high[lane];
    }
  }
  const float least = *std::min_element(low, low + kLanes), most = *std::max_element(high, high + kLanes);
  const float largest = -least > most ? least : most;
  return std::abs(largest) > 0x1p-20f ? largest / -8 : 0.0f;
}

void quantize_block(const float* x, float scale, std::byte* nibbles) {
  const float inverse = scale != 0 ? 1 / scale : 0.0f;
  int32_t q[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    const float level = x[i] * inverse + 8.5f;
    q[i] = static_cast<int32_t>(level < 15 ? level : 15.0f);
  }
  for (int64_t i = 0; i < kBlock / 2; ++i) nibbles[i] = static_cast<std::byte>(q[i] | q[i + kBlock / 2] << 4);
}

// The length of a vector of whole blocks, whose columns `value` gives.
template <class Value>
double norm(int64_t n, Value value) {
  constexpr int64_t kLanes = 8;
  double total = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    float sums[kLanes] = {};
    for (int64_t i = block; i < block + kBlock; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += value(i + lane) * value(i + lane);
    }
    for (const float sum : sums) total += sum;
  }
  return std::sqrt(total);
}

double norm(const float* x, int64_t n) {
  return norm(n, [x](int64_t i) { return x[i]; });
}

// The length of vector 0 as its int8 blocks have it, over the weights of its columns.
double quantized_norm(const Vectors& x, const float* weights) {
  double total = 0;
  for (int64_t begin = 0; begin < x.cols / kBlock;) {
    const int64_t group = group_size(x.cols / kBlock - begin);
    for (int64_t b = 0; b < group; ++b) {
      float sum = 0;
      for (int64_t i = 0; i < kBlock; ++i) {
        const auto q = static_cast<float>(x.q[begin * kBlock + byte_in_group(group, b, i)]);
        const float value = q / weights[(begin + b) * kBlock + i];
        sum += value * value;
      }
      const double scale = x.scale[begin + b];
      total += scale * scale * sum;
    }
    begin += group;
  }
  return std::sqrt(total);
}

// What rounding may add to the product of a row with a vector of length 1. Every term goes through at most `depth`
// operations, each of which loses 2^-24 of what it gives (2^-23 leaves room for their products). The terms' sizes add
// up to the row's length times the vector's; but unsigned quants take their offset back in another lane of the sum
// (S::kQ8Bias), so for blocks these are up to 255 + 128 or 15 + 8 times the largest scale.
double rounding(const Matrix& w, double length, float largest_scale) {
  constexpr double kOther = 20;  // adding up lanes, scales, and the comparison with the bound
  if (!is_blocked(w.type)) return (static_cast<double>(w.cols) + kOther) * 0x1p-23 * length;
  const double depth = 2 * static_cast<double>(w.cols / kBlock) + kOther;
  const double quant = w.type == WeightType::q4_0 ? 15 + kQ4Offset : 255 + kQ8Offset;
  return depth * 0x1p-23 * quant * largest_scale * std::sqrt(static_cast<double>(w.cols));
}

}  // namespace

bool Sketch::pays(const Kernels& kernels, const Matrix& w) {
  if (w.cols % kBlock != 0 || w.type == WeightType::ternary) return false;
  const Matrix sketch = kernels.layout(WeightType::q4_0, w.rows, w.cols, nullptr);
  return static_cast<double>(w.row_bytes) >= kLeastRatio * static_cast<double>(sketch.row_bytes);
}

Sketch::Sketch(const Kernels& kernels, const Matrix& w, const std::vector<double>& squares, Team& team)
    : storage_(kernels.packed_bytes(WeightType::q4_0, w.rows, w.cols)),
      view_(kernels.layout(WeightType::q4_0, w.rows, w.cols, storage_.data())),
      weights_(w.cols, 1.0f),
      bounds_(w.rows) {
  // A few vectors say little of small columns, so none counts for less than the mean.
  const double mean = std::accumulate(squares.begin(), squares.end(), 0.0) / static_cast<double>(w.cols);
  for (int64_t c = 0; c < w.cols && mean > 0; ++c) {
    weights_[c] = static_cast<float>(std::sqrt(std::sqrt(1 + squares[c] / mean)));
    most_weight_ = std::max<double>(most_weight_, weights_[c]);
  }
  std::vector<float> largest(team.size());
  team.run([&](Member& member) {
    const auto [first, last] = member.part(w.rows, kPiece);
    for (int64_t row = first; row < last; row += kPiece) {
      const float most = fill(kernels, w, row, std::min(row + kPiece, last));
      largest[member.rank()] = std::max(largest[member.rank()], most);
    }
  });
  largest_ = *std::max_element(largest.begin(), largest.end());
}

float Sketch::fill(const Kernels& kernels, const Matrix& w, int64_t first, int64_t last) {
  const int64_t n = last - first, cols = w.cols, blocks = cols / kBlock;
  std::vector<float> rows(n * cols), scales(blocks), sketched(cols);
  std::vector<uint16_t> halves(blocks);
  std::vector<std::byte> source(n * blocks * kSourceBytes);
  for (int64_t r = 0; r < n; ++r) {
    float* row = &rows[r * cols];
    kernels.decode_row(w, first + r, row);
    for (int64_t b = 0; b < blocks; ++b) scales[b] = scale_of(row + b * kBlock);
    kernels.to_f16(scales.data(), halves.data(), blocks);
    const bool fits = norm(row, cols) < 65504;  // so that every number and every scale has a float16
    if (!fits) return INFINITY;
    for (int64_t b = 0; b < blocks; ++b) {
      std::byte* to = &source[(r * blocks + b) * kSourceBytes];
      std::memcpy(to, &halves[b], sizeof(uint16_t));
      quantize_block(row + b * kBlock, scales[b], to + sizeof(uint16_t));
    }
  }
  kernels.pack(view_, storage_.data(), first, last, source.data());
  float scale[kPiece] = {}, scale_of_sketch[kPiece];
  const auto largest_scales = [&](Matrix rows_of, float* out) {
    rows_of.values += first * rows_of.row_bytes;
    kernels.largest_scales(rows_of, 0, n, out);
  };
  if (is_blocked(w.type)) largest_scales(w, scale);
  largest_scales(view_, scale_of_sketch);
  float most = 0;
  for (int64_t r = 0; r < n; ++r) {
    const float* row = &rows[r * cols];
    kernels.decode_row(view_, first + r, sketched.data());
    const double whole = norm(row, cols), coarse = norm(sketched.data(), cols);
    const double loss =
        kInputLoss * whole + rounding(w, whole, scale[r]) + rounding(view_, coarse, scale_of_sketch[r]) + kLeastBound;
    // What is lost elsewhere goes by |x|, which is at most |x / m| times the largest weight.
    const float *coarse_row = sketched.data(), *weights = weights_.data();
    const double lost = norm(cols, [=](int64_t i) { return (row[i] - coarse_row[i]) * weights[i]; });
    const double bound = lost + most_weight_ * loss;
    bounds_[first + r] = static_cast<float>(kUp * bound);
    most = std::max(most, static_cast<float>(2 * (most_weight_ * whole + bound)));
  }
  return most;
}

float Sketch::length(const Vectors& x) const {
  double terms = quantized_norm(x, weights_.data());
  if (x.rest) terms += quantized_norm(*x.rest, weights_.data());
  return static_cast<float>(kUp * (1 + most_weight_ * kInputLoss) * terms + kLeastLength);
}

}  // namespace turbosparse
