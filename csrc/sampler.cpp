// SPDX-License-Identifier: Apache-2.0
#include "sampler.h"

#include <algorithm>
#include <cmath>
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

// Candidates from the likeliest on, sorted no further than they are asked for: a draw is mostly among the first.
class Ordered {
 public:
  explicit Ordered(std::vector<Candidate>& candidates) : candidates_(candidates), left_(candidates.size()) {
    std::make_heap(candidates_.begin(), candidates_.end(), less_likely);
  }
  // The one at a place; places are asked for in order.
  const Candidate& at(size_t place) {
    while (candidates_.size() - left_ <= place) {
      std::pop_heap(candidates_.begin(), candidates_.begin() + static_cast<int64_t>(left_), less_likely);
      --left_;
    }
    return candidates_[candidates_.size() - 1 - place];
  }

 private:
  static bool less_likely(const Candidate& a, const Candidate& b) { return likelier(b, a); }
  std::vector<Candidate>& candidates_;
  size_t left_;  // that are not sorted yet, in front
};

// The candidate that `number`, uniform in [0, 1), falls on.
int32_t draw(std::vector<Candidate>& candidates, const SamplingParams& params, double number) {
  Ordered ordered(candidates);
  const double highest = ordered.at(0).logit;
  const auto weight = [&](const Candidate& each) { return std::exp(each.logit - highest); };
  double total = 0;
  for (const Candidate& each : candidates) total += weight(each);
  size_t kept = candidates.size();
  double mass = total;
  if (params.top_p < 1 || params.min_p > 0) {
    // The first token always stays; a later one while the mass before it is short of top_p, and not under min_p.
    kept = 0;
    mass = 0;
    while (kept < candidates.size()) {
      const double next = weight(ordered.at(kept));
      if (kept > 0 && !(mass < params.top_p * total && next >= params.min_p)) break;
      mass += next;
      ++kept;
    }
  }
  double left = number * mass;
  int32_t last = ordered.at(0).id;
  for (size_t place = 0; place < kept; ++place) {
    const Candidate& each = ordered.at(place);
    const double share = weight(each);
    if (!(share > 0)) break;  // never chosen, even where rounding leaves something of `left`
    last = each.id;
    left -= share;
    if (left < 0) break;
  }
  return last;
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
  return draw(candidates, params, uniform(params.seed, position));
}

}  // namespace turbosparse
