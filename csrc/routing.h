// SPDX-License-Identifier: Apache-2.0
// Which FFNs of a layer compute which rows of a pass: the only one all of them, an expert those whose router chose it.
#pragma once

#include <cstdint>
#include <vector>

namespace turbosparse {

// One slot for each pair of a row and an FFN that computes it. Slots of an FFN stand together, its rows ascending, and
// FFNs ascend: what several rows need of an expert is read once, and a row adds its experts up in an order of their
// own.
struct Routing {
  struct Group {
    int64_t expert, first, n;  // slots [first, first + n)
  };
  std::vector<Group> groups;
  std::vector<int32_t> row;   // of each slot
  std::vector<float> weight;  // of each slot: what the output counts in its row

  int64_t slots() const { return static_cast<int64_t>(row.size()); }

  // All of n rows go to FFN 0.
  void all(int64_t n);

  // Each row goes to the `used` experts that score highest, the lower index among equals; their weights are the softmax
  // of these scores. scores [n, experts]; 1 <= used <= experts. A score that is not a number makes weights that are
  // none.
  void choose(const float* scores, int64_t n, int64_t experts, int64_t used);

 private:
  std::vector<float> share_;     // [n, experts], of those that are chosen
  std::vector<uint8_t> chosen_;  // [n, experts]
};

}  // namespace turbosparse
