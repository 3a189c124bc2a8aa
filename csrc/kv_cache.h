// SPDX-License-Identifier: Apache-2.0
// Keys and values of one sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "model.h"

namespace turbosparse {

// Every head of every layer has a matrix of keys and one of values, a row a position, in the layout of the kernels. A
// layer that slides keeps only what its window can still reach: position p lies in cell p % cells(layer).
class KvCache {
 public:
  // `type`: f32, f16 or q8_0. `ahead`: positions that are stored together before any of them is attended from. Throws
  // std::invalid_argument where a head is not whole blocks of q8_0.
  KvCache(const Config& config, const Kernels& kernels, WeightType type, int64_t context, int64_t ahead);

  // Whether all that a token at `position` attends to is still there after positions up to `furthest` were stored.
  bool holds_until(int64_t position, int64_t furthest) const;
  int64_t cells(int64_t layer) const { return cells_[layer]; }
  const Matrix& keys(int64_t layer, int64_t head) const { return parts_[part(layer, head, 0)].view; }
  const Matrix& values(int64_t layer, int64_t head) const { return parts_[part(layer, head, 1)].view; }
  void store_key(int64_t layer, int64_t head, int64_t position, const float* x) { store(layer, head, 0, position, x); }
  void store_value(int64_t layer, int64_t head, int64_t position, const float* x) {
    store(layer, head, 1, position, x);
  }
  WeightType type() const { return type_; }
  size_t bytes() const { return memory_.size(); }

 private:
  struct Part {
    Matrix view;
    std::byte* storage;
  };
  size_t part(int64_t layer, int64_t head, int64_t which) const { return 2 * (layer * heads_ + head) + which; }
  void store(int64_t layer, int64_t head, int64_t which, int64_t position, const float* x);

  const Kernels& kernels_;
  WeightType type_;
  int64_t heads_, width_;
  int64_t context_, ahead_;
  std::vector<int64_t> cells_;  // of each layer
  Mapping memory_;
  std::vector<Part> parts_;
};

}  // namespace turbosparse
