// SPDX-License-Identifier: Apache-2.0
#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <unordered_set>

namespace turbosparse {
namespace {

struct Candidate {
  float logit;  // over the temperature
  int32_t id;
};

bool likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

uint64_t mix(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

uint64_t key_of(uint64_t seed, uint64_t position) { return mix(seed) ^ mix(~position); }

double fraction(uint64_t number) { return static_cast<double>(number >> 11) * 0x1p-53; }

// The largest number, -inf where there is none.
float maximum(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;  // chains of comparisons that do not wait for each other
  float most[kLanes];
  std::fill_n(most, kLanes, -INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
  }
  for (; i < n; ++i) most[0] = x[i] > most[0] ? x[i] : most[0];
  return *std::max_element(most, most + kLanes);
}

std::vector<float> penalised(const float* logits, int64_t vocab, float penalty, const std::vector<int32_t>& history) {
  std::vector<float> out(logits, logits + vocab);
  for (const int32_t id : std::unordered_set<int32_t>(history.begin(), history.end())) {
    out[id] = out[id] > 0 ? out[id] / penalty : out[id] * penalty;
  }
  return out;
}

// What tokens weigh: the likeliest 1.
struct Weights {
  const float* logits;
  int64_t vocab;
  float temperature, highest;  // logit over the temperature

  float scaled(int64_t id) const { return logits[id] / temperature; }
  double of(float scaled) const { return std::exp(static_cast<double>(scaled) - highest); }
};

// What at least k numbers reach: of the largest of each run of them, the k-th.
float reached(const float* x, int64_t n, int64_t k) {
  constexpr int64_t kRun = 64;
  std::vector<float> largest;
  for (int64_t first = 0; first < n; first += kRun) largest.push_back(maximum(x + first, std::min(kRun, n - first)));
  if (k > static_cast<int64_t>(largest.size())) return -INFINITY;
  std::nth_element(largest.begin(), largest.begin() + (k - 1), largest.end(), std::greater<>());
  return largest[k - 1];
}

// The tokens that top-k and top-p keep, one of which is asked for.
std::vector<Candidate> kept(const Weights& weights, const SamplingParams& params) {
  const float enough =
      params.top_k > 0 ? reached(weights.logits, weights.vocab, params.top_k) / weights.temperature : -INFINITY;
  std::vector<Candidate> tokens;
  if (params.top_k == 0) tokens.reserve(weights.vocab);
  for (int64_t id = 0; id < weights.vocab; ++id) {
    const float scaled = weights.scaled(id);
    if (scaled > -INFINITY && scaled >= enough) tokens.push_back({scaled, static_cast<int32_t>(id)});
  }
  if (params.top_k > 0 && params.top_k < static_cast<int64_t>(tokens.size())) {
    std::nth_element(tokens.begin(), tokens.begin() + (params.top_k - 1), tokens.end(), likelier);
    tokens.resize(params.top_k);
  }
  if (params.top_p >= 1) return tokens;
  double total = 0;
  for (const Candidate& each : tokens) total += std::exp(each.logit - weights.highest);  // fp32 will do
  // Together, tokens that weigh less than this lie beyond top-p: they need no order.
  const double least = 0.5 * (1.0 - params.top_p) * total / static_cast<double>(tokens.size());
  const double bound = weights.highest + std::log(least);
  const auto beyond =
      std::partition(tokens.begin(), tokens.end(), [&](const Candidate& t) { return t.logit >= bound; });
  std::sort(tokens.begin(), beyond, likelier);
  double mass = 0;
  auto end = tokens.begin();
  while (end != beyond && mass < params.top_p * total) mass += weights.of((end++)->logit);
  tokens.erase(end, tokens.end());
  return tokens;
}

// No less than 2^x, for x <= 0, and little more: a line between powers of two. Not a number for x: 2^-126.
float above_power(float x) {
  return x >= -126 ? 1.0001f * std::bit_cast<float>(static_cast<int32_t>((x + 127) * 0x1p23f)) : 0x1p-126f;
}

// Every token waits for an exponential time, the shorter the more it weighs, and the first one is drawn: so the chances
// are those of the weights, whichever tokens take part (in logarithms, the Gumbel-max trick). A token's time hangs on
// seed, position and its own logit alone. Logits that differ a little, as those of a draft do, therefore mostly draw
// the same token.
class Race {
 public:
  Race(const Weights& weights, float min_p, uint64_t key, int32_t likeliest)
      : weights_(weights), min_p_(min_p), key_(key), first_(likeliest), shortest_(unit(likeliest)) {}

  void enter(const Candidate& token) {
    const double weight = weights_.of(token.logit), time = unit(token.id) / weight;
    if (time < shortest_ && weight >= min_p_) shortest_ = time, first_ = token.id;
  }

  // All tokens. -log(1 - u) >= u, so most are seen to be late without a logarithm.
  void enter_all() {
    constexpr float kLog2e = 1.44269504f;
    auto latest = static_cast<float>(shortest_);
    for (int32_t id = 0; id < weights_.vocab; ++id) {
      const float scaled = weights_.scaled(id), u = static_cast<float>(number(id) >> 40) * 0x1p-24f;
      if (u > latest * above_power((scaled - weights_.highest) * kLog2e)) continue;
      enter({scaled, id});
      latest = static_cast<float>(shortest_);
    }
  }

  int32_t first() const { return first_; }

 private:
  uint64_t number(int32_t id) const { return mix(key_ + static_cast<uint64_t>(id)); }
  double unit(int32_t id) const { return -std::log1p(-fraction(number(id))); }

  Weights weights_;
  float min_p_;
  uint64_t key_;
  int32_t first_;
  double shortest_;
};

}  // namespace

double uniform(uint64_t seed, uint64_t position) { return fraction(key_of(seed, position)); }

int32_t sample(const float* logits, int64_t vocab, const SamplingParams& params, const std::vector<int32_t>& history,
               uint64_t position) {
  std::vector<float> changed;
  if (params.repetition_penalty != 1) {
    changed = penalised(logits, vocab, params.repetition_penalty, history);
    logits = changed.data();
  }
  const float highest = maximum(logits, vocab);
  if (highest == -INFINITY) return 0;
  const auto likeliest = static_cast<int32_t>(std::find(logits, logits + vocab, highest) - logits);
  if (params.temperature <= 0 || !std::isfinite(highest / params.temperature)) return likeliest;
  const Weights weights{logits, vocab, params.temperature, highest / params.temperature};
  Race race(weights, params.min_p, key_of(params.seed, position), likeliest);
  if (params.top_k > 0 || params.top_p < 1) {
    for (const Candidate& token : kept(weights, params)) race.enter(token);
  } else {
    race.enter_all();
  }
  return race.first();
}

}  // namespace turbosparse
