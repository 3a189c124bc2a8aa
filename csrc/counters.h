// SPDX-License-Identifier: Apache-2.0
// What an engine counts while it runs, over all of its sessions.
#pragma once

#include <cstdint>
#include <vector>

namespace turbosparse {

// What decoding cost, summed over tokens.
struct Traffic {
  int64_t tokens = 0;
  int64_t bytes = 0;             // of weights read
  int64_t active_neurons = 0;    // with h != 0, over all layers
  int64_t open_gates = 0;        // gate > 0, of those that were computed
  int64_t selected_neurons = 0;  // by predictors

  Traffic& operator+=(const Traffic& other) {
    tokens += other.tokens;
    bytes += other.bytes;
    active_neurons += other.active_neurons;
    open_gates += other.open_gates;
    selected_neurons += other.selected_neurons;
    return *this;
  }
};

// On how many tokens every neuron had gate > 0, up > 0 and h != 0, was selected by the predictor, and was both selected
// and active; the sum of its |h|, and of that where the predictor did not select it: [layers * FFNs * ffn] each. And
// how many tokens every FFN of a layer computed: [layers * FFNs].
struct Counts {
  int64_t tokens = 0;
  std::vector<int64_t> routed;
  std::vector<int64_t> gate, up, h, selected, hit;
  std::vector<double> mass, missed;
};

}  // namespace turbosparse
