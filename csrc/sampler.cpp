// SPDX-License-Identifier: Apache-2.0
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_set>

namespace turbosparse {
namespace {

struct Candidate {
  float logit;
  int32_t id;
};

bool likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

uint64_t mix(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

std::vector<float> penalised(const float* logits, int64_t vocab, float penalty, const std::vector<int32_t>& history) {
  std::vector<float> out(logits, logits + vocab);
  for (float& logit : out) {
    if (std::isnan(logit)) logit = -INFINITY;
  }
  if (penalty == 1) return out;
  for (const int32_t id : std::unordered_set<int32_t>(history.begin(), history.end())) {
    out[id] = out[id] > 0 ? out[id] / penalty : out[id] * penalty;
  }
  return out;
}

}  // namespace

double uniform(uint64_t seed, uint64_t position) {
  return static_cast<double>(mix(mix(seed) ^ mix(~position)) >> 11) * 0x1p-53;
}

int32_t sample(const float* logits, int64_t vocab, const SamplingParams& params, const std::vector<int32_t>& history,
               uint64_t position) {
  const std::vector<float> adjusted = penalised(logits, vocab, params.repetition_penalty, history);
  if (params.temperature <= 0) {
    return static_cast<int32_t>(std::max_element(adjusted.begin(), adjusted.end()) - adjusted.begin());
  }
  std::vector<Candidate> candidates(vocab);
  for (int64_t i = 0; i < vocab; ++i) candidates[i] = {adjusted[i] / params.temperature, static_cast<int32_t>(i)};
  const auto k = static_cast<size_t>(params.top_k);
  if (params.top_k > 0 && k < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), likelier);
    candidates.resize(k);
  }
  std::sort(candidates.begin(), candidates.end(), likelier);
  std::vector<double> weight(candidates.size());
  const double highest = candidates[0].logit;
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = std::exp(candidates[i].logit - highest);
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  size_t kept = 0;
  double mass = 0;
  // The first token always stays; a later one while the mass before it is short of top_p, and not under min_p.
  while (kept < weight.size() && (kept == 0 || (mass < params.top_p * total && weight[kept] >= params.min_p))) {
    mass += weight[kept++];
  }
  double left = uniform(params.seed, position) * mass;
  for (size_t i = 0; i < kept; ++i) {
    left -= weight[i];
    if (left < 0) return candidates[i].id;
  }
  return candidates[kept - 1].id;
}

}  // namespace turbosparse
