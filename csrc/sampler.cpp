// SPDX-License-Identifier: Apache-2.0
#include "sampler.h"

#include <algorithm>
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

std::vector<float> all_penalised(const float* logits, int64_t vocab, float penalty,
                                 const std::vector<int32_t>& history) {
  std::vector<float> out(logits, logits + vocab);
  for (const int32_t id : std::unordered_set<int32_t>(history.begin(), history.end())) {
    out[id] = penalised(out[id], penalty);
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

}  // namespace

double uniform(uint64_t seed, uint64_t position) { return fraction(key_of(seed, position)); }

Race::Race(const SamplingParams& params, uint64_t position, float highest)
    : min_p_(params.min_p), highest_(highest), key_(key_of(params.seed, position)) {}

void Race::enter(int32_t id, float scaled) {
  if (!(scaled > -INFINITY)) return;
  if (min_p_ > 0 && std::exp(static_cast<double>(scaled) - highest_) < min_p_) return;
  const double reached = scaled - std::log(-std::log1p(-fraction(number(id))));
  if (reached < best_ || (reached == best_ && id > first_)) return;
  best_ = reached;
  first_ = id;
  line_ = static_cast<float>(best_);
  if (line_ > best_) line_ = std::nextafter(line_, -INFINITY);
}

int32_t sample(const float* logits, int64_t vocab, const SamplingParams& params, const std::vector<int32_t>& history,
               uint64_t position) {
  std::vector<float> changed;
  if (params.repetition_penalty != 1) {
    changed = all_penalised(logits, vocab, params.repetition_penalty, history);
    logits = changed.data();
  }
  const float highest = maximum(logits, vocab);
  if (highest == -INFINITY) return 0;
  const auto likeliest = static_cast<int32_t>(std::find(logits, logits + vocab, highest) - logits);
  if (params.temperature <= 0 || !std::isfinite(highest / params.temperature)) return likeliest;
  const Weights weights{logits, vocab, params.temperature, highest / params.temperature};
  Race race(params, position, weights.highest);
  race.enter(likeliest, weights.highest);
  if (params.top_k > 0 || params.top_p < 1) {
    for (const Candidate& token : kept(weights, params)) race.enter(token.id, token.logit);
    return race.first();
  }
  for (int32_t id = 0; id < vocab; ++id) race.enter_quickly(id, race.early(id), weights.scaled(id));
  return race.first();
}

int32_t sample_listed(const int32_t* ids, const float* logits, int64_t n, const SamplingParams& params,
                      uint64_t position) {
  int64_t likeliest = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (likelier({logits[i], ids[i]}, {logits[likeliest], ids[likeliest]})) likeliest = i;
  }
  if (params.temperature <= 0) return ids[likeliest];
  const float highest = logits[likeliest] / params.temperature;
  Race race(params, position, highest);
  race.enter(ids[likeliest], highest);
  for (int64_t i = 0; i < n; ++i) race.enter_quickly(ids[i], race.early(ids[i]), logits[i] / params.temperature);
  return race.first();
}

}  // namespace turbosparse
