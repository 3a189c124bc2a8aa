// SPDX-License-Identifier: Apache-2.0
#include "choice.h"

#include <algorithm>

namespace turbosparse {
namespace {

// What a row of a list costs, where one of a matrix that is read from end to end costs 1 (docs/experiments.md): it
// comes from a place that the processor does not foresee, and adding a row up is more work than a product.
constexpr double kListed = 1.3, kAdded = 1.9;

}  // namespace

Choice::Choice(int64_t neurons, int64_t per_gate, int64_t per_up, const std::vector<double>& predictor_cost,
               bool by_gate)
    : neurons_(neurons),
      gate_cost_(1.0 / static_cast<double>(per_gate)),
      up_cost_(1.0 / static_cast<double>(per_up)),
      by_gate_(by_gate),
      layers_(predictor_cost.size()),
      chosen_(predictor_cost.size(), Mode::exact) {
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i].predictor_cost = gate_cost_ * predictor_cost[i];
}

void Choice::count(int64_t layer, int64_t open, int64_t active, int64_t selected) {
  layers_[layer].open.fetch_add(open, std::memory_order_relaxed);
  layers_[layer].active.fetch_add(active, std::memory_order_relaxed);
  layers_[layer].selected.fetch_add(selected, std::memory_order_relaxed);
}

void Choice::begin_token(bool predicts) {
  if (predicts != predicts_) reset();
  predicts_ = predicts;
}

void Choice::finish_token() {
  if (!counting() || ++tokens_ < kTokens) return;
  for (size_t i = 0; i < layers_.size(); ++i) chosen_[i] = cheapest(layers_[i]);
}

void Choice::reset() {
  tokens_ = 0;
  for (Layer& layer : layers_) layer.open = layer.active = layer.selected = 0;
  std::fill(chosen_.begin(), chosen_.end(), Mode::exact);
}

Mode Choice::cheapest(const Layer& layer) const {
  const double seen = static_cast<double>(tokens_ * neurons_);
  const double open = layer.open / seen, active = layer.active / seen, selected = layer.selected / seen;
  // Of each neuron. Those that share an up share a gate too, so that it is needed for all of them or none.
  const double ups = up_cost_ * open;
  const double dense = gate_cost_ + up_cost_ + 1, exact = gate_cost_ + kListed * ups + kAdded * active;
  // Of the selected neurons: one for each, as far as there are so many; and so their gates, or every gate.
  const double needed = std::min(ups, selected);
  const double found = by_gate_ ? gate_cost_ : layer.predictor_cost + kListed * std::min(selected, gate_cost_);
  const double predicted = found + kListed * needed + kAdded * active;
  if (predicts_ && (by_gate_ || layer.predictor_cost > 0) && predicted < std::min(dense, exact)) return Mode::predicted;
  return exact < dense ? Mode::exact : Mode::dense;
}

}  // namespace turbosparse
