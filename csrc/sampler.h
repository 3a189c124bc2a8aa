// SPDX-License-Identifier: Apache-2.0
// Choosing the next token. The generator is a function of seed, position and token, so a text depends on nothing else.
#pragma once

#include <cstdint>
#include <vector>

namespace turbosparse {

struct SamplingParams {
  float temperature = 0;  // 0: the likeliest token, the lowest id among equals
  int32_t top_k = 0;      // 0: all
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  uint64_t seed = 0;
};

// Uniform in [0, 1), from SplitMix64 (Steele, Lea, Flood 2014) over seed and position.
double uniform(uint64_t seed, uint64_t position);

// logits [vocab]; `history` are the tokens that the repetition penalty (CTRL, arXiv 1909.05858) applies to. Filters act
// in the order temperature, top-k, top-p, min-p. Logits that are not numbers are never chosen.
int32_t sample(const float* logits, int64_t vocab, const SamplingParams& params, const std::vector<int32_t>& history,
               uint64_t position);

}  // namespace turbosparse
