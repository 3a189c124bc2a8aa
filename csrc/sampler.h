// SPDX-License-Identifier: Apache-2.0
// Choosing the next token. The generator is a function of seed, position and token, so a text depends on nothing else.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
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

// Uniform in [0, 1), from SplitMix64 over seed and position.
double uniform(uint64_t seed, uint64_t position);

// The step of SplitMix64 (Steele, Lea, Flood 2014).
inline uint64_t mix(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// No less than 2^x and little more, for x <= 0: a line between powers of two. For less than -126, and what is no
// number, 2^-126.
inline float above_power(float x) {
  const float within = x > -126 ? x : -126.0f;
  return 1.0001f * std::bit_cast<float>(static_cast<int32_t>((within + 127) * 0x1p23f));
}

// Every token waits for an exponential time, the shorter the more it weighs, and the first one is drawn: so the chances
// are those of the weights, whichever tokens take part (the Gumbel-max trick: in logarithms, a token's logit over the
// temperature and what its time adds). What a token reaches hangs on seed, position and its own logit alone. Logits
// that differ a little, as those of a draft do, therefore mostly draw the same token; and a token whose logit is known
// not to exceed something may be known to lose.
class Race {
 public:
  // `highest`: the largest logit over the temperature, for min-p.
  Race(const SamplingParams& params, uint64_t position, float highest);

  // `scaled` is the token's logit over the temperature. Among equals the lowest id wins; what is no number never does.
  void enter(int32_t id, float scaled);
  // The same, where most are seen to lose without a logarithm.
  void enter_quickly(int32_t id, float early, float scaled) {
    if (early <= reach(scaled)) enter(id, scaled);
  }

  // A token's time, -log(1 - u), is no less than this, the first bits of u.
  float early(int32_t id) const { return static_cast<float>(number(id) >> 40) * 0x1p-24f; }
  // The latest time, or a little more, at which a token of a logit of at most that much would still be the first one.
  float reach(float scaled) const {
    constexpr float kLog2e = 1.44269504f;
    const float power = (scaled - line_) * kLog2e;
    return above_power(power < 0 ? power : 0.0f);  // u < 1
  }

  int32_t first() const { return first_; }  // -1: nobody entered

 private:
  uint64_t number(int32_t id) const { return mix(key_ + static_cast<uint64_t>(id)); }

  float min_p_, highest_;
  uint64_t key_;
  int32_t first_ = -1;
  double best_ = -INFINITY;  // what the first one reached
  float line_ = -INFINITY;   // the largest float that is no more
};

// logits [vocab]; `history` are the tokens that the repetition penalty (CTRL, arXiv 1909.05858) applies to. Filters act
// in the order temperature, top-k, top-p, min-p. Logits that are not numbers are never chosen.
int32_t sample(const float* logits, int64_t vocab, const SamplingParams& params, const std::vector<int32_t>& history,
               uint64_t position);

// The same of a few tokens, where the others are known not to be drawn; in that of a single token, its logit with the
// repetition penalty. No top-k and no top-p. n > 0, and logits are numbers.
int32_t sample_listed(const int32_t* ids, const float* logits, int64_t n, const SamplingParams& params,
                      uint64_t position);
inline float penalised(float logit, float penalty) { return logit > 0 ? logit / penalty : logit * penalty; }

}  // namespace turbosparse
