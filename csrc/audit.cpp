// SPDX-License-Identifier: Apache-2.0
#include "audit.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "sampler.h"

namespace turbosparse {
namespace {

constexpr uint64_t kSalt = 0xA0D17;         // audits are drawn beside the sampler's draws, not with them
constexpr size_t kFewest = 16;              // audits before a layer can be said to drift
constexpr size_t kPooled = 32;              // of the last audits the neurons are kept
constexpr double kErrors = 4;               // standard errors that a drift is away
constexpr double kMore = 1.5, kLess = 0.5;  // and what it misses, over what it may miss

double log_sum(const float* x, int64_t n, double highest) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - highest);
  return highest + std::log(sum);
}

}  // namespace

double divergence(const float* p, const float* q, int64_t n) {
  const double p_sum = log_sum(p, n, *std::max_element(p, p + n));
  const double q_sum = log_sum(q, n, *std::max_element(q, q + n));
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += std::exp(p[i] - p_sum) * ((p[i] - p_sum) - (q[i] - q_sum));
  return total;
}

Audit::Audit(const Config& config)
    : n_layers_(config.layers),
      ffns_(config.ffns()),
      slots_(config.ffns_used()),
      ffn_(config.ffn),
      promised_thresholds_(config.predictor_thresholds),
      thresholds_(config.predictor_thresholds) {
  thresholds_.resize(n_layers_ * ffns_);
  promised_thresholds_.resize(n_layers_ * ffns_);
}

void Audit::begin(double share, uint64_t seed, std::vector<double> promised) {
  if (static_cast<int64_t>(promised.size()) != n_layers_) throw std::invalid_argument("one promise a layer");
  share_ = share;
  seed_ = seed;
  promised_ = std::move(promised);
  recent_.resize(n_layers_);
  layers_.resize(n_layers_);
}

void Audit::restart() {
  thresholds_ = promised_thresholds_;
  for (Recent& recent : recent_) recent = {};
}

bool Audit::due(int64_t position) const {
  return share_ > 0 && uniform(seed_ ^ kSalt, static_cast<uint64_t>(position)) < share_;
}

void Audit::open() { noted_.assign(n_layers_ * slots_ * ffn_, Noted{0, 0}); }

void Audit::close(int64_t position, const float* exact, const float* predicted, int64_t vocab) {
  LayerVerdict all;
  for (int64_t layer = 0; layer < n_layers_; ++layer) {
    const LayerVerdict one = judge(layer);
    all.fired += one.fired;
    all.hit += one.hit;
    all.mass += one.mass;
    all.kept += one.kept;
    if (promised_[layer] > 0 && drifts(layer)) move(layer, position);
  }
  const double recall = all.fired > 0 ? static_cast<double>(all.hit) / static_cast<double>(all.fired) : 1;
  verdicts_.push_back({position, recall, all.mass > 0 ? all.kept / all.mass : 1, divergence(exact, predicted, vocab)});
}

// What was noted of a layer, added to what is known of it.
LayerVerdict Audit::judge(int64_t layer) {
  LayerVerdict one;
  Recent& recent = recent_[layer];
  const Noted* noted = &noted_[layer * slots_ * ffn_];
  for (int64_t i = 0; i < slots_ * ffn_; ++i) {
    if (!(noted[i].mass > 0)) continue;
    const bool selected = noted[i].margin > 0;
    one.fired += 1;
    one.hit += selected;
    one.mass += noted[i].mass;
    one.kept += selected ? noted[i].mass : 0;
    recent.neurons.push_back(noted[i]);
  }
  LayerVerdict& sum = layers_[layer];
  sum.fired += one.fired;
  sum.hit += one.hit;
  sum.mass += one.mass;
  sum.kept += one.kept;
  if (!(one.mass > 0)) return one;
  recent.kept.push_back(one.kept / one.mass);
  recent.ends.push_back(recent.neurons.size());
  if (recent.ends.size() > kPooled) {
    const size_t oldest = recent.ends.front();
    recent.neurons.erase(recent.neurons.begin(), recent.neurons.begin() + static_cast<int64_t>(oldest));
    recent.ends.erase(recent.ends.begin());
    for (size_t& end : recent.ends) end -= oldest;
  }
  return one;
}

bool Audit::drifts(int64_t layer) const {
  const Recent& recent = recent_[layer];
  const double promised = promised_[layer];
  const size_t n = recent.kept.size();
  if (n < kFewest) return false;
  const double mean = std::accumulate(recent.kept.begin(), recent.kept.end(), 0.0) / static_cast<double>(n);
  double squares = 0;
  for (const double kept : recent.kept) squares += (kept - mean) * (kept - mean);
  const double error = std::sqrt(squares / static_cast<double>(n - 1) / static_cast<double>(n));
  const double missed = (1 - mean) / (1 - promised);
  return std::fabs(mean - promised) > kErrors * error && (missed > kMore || missed < kLess);
}

// Move the thresholds of a layer to where the pooled neurons would have kept what was promised.
void Audit::move(int64_t layer, int64_t position) {
  Recent& recent = recent_[layer];
  std::vector<Noted>& neurons = recent.neurons;
  std::stable_sort(neurons.begin(), neurons.end(), [](const Noted& a, const Noted& b) { return a.margin > b.margin; });
  double mass = 0, kept = 0;
  for (const Noted& each : neurons) mass += each.mass;
  size_t last = 0;
  while (last + 1 < neurons.size() && (kept += neurons[last].mass) < promised_[layer] * mass) ++last;
  const float by = neurons[last].margin;
  for (int64_t expert = 0; expert < ffns_; ++expert) thresholds_[layer * ffns_ + expert] += by;
  const double mean =
      std::accumulate(recent.kept.begin(), recent.kept.end(), 0.0) / static_cast<double>(recent.kept.size());
  moves_.push_back({position, layer, mean, by});
  recent = {};
}

}  // namespace turbosparse
