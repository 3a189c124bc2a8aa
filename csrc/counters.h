// SPDX-License-Identifier: Apache-2.0
// What an engine counts while it runs, over all of its sessions.
#pragma once

#include <cstdint>
#include <vector>

namespace turbosparse {

// What decoding cost, summed over tokens.
struct Traffic {
  int64_t tokens = 0;
  int64_t bytes = 0;           // of weights read
  int64_t active_neurons = 0;  // with h != 0, over all layers
  int64_t open_gates = 0;      // gate > 0
};

// How often every neuron fired, [layers * ffn] each: gate > 0, up > 0, h != 0.
struct Counts {
  int64_t tokens = 0;
  std::vector<int64_t> gate, up, h;
};

}  // namespace turbosparse
