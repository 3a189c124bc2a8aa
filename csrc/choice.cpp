// SPDX-License-Identifier: Apache-2.0
#include "choice.h"

#include <algorithm>

namespace turbosparse {
namespace {

// What a row costs, where one of a range that is multiplied costs 1 (docs/experiments.md). Rows of down are added up,
// which is more work than a product; rows of a list come from places that the processor does not foresee.
constexpr double kListed = 1.3, kAdded = 1.3, kAddedOfList = 1.9;

}  // namespace

Choice::Choice(int64_t neurons, const std::vector<double>& predictor_cost)
    : neurons_(neurons), layers_(predictor_cost.size()), chosen_(predictor_cost.size(), Mode::exact) {
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i].predictor_cost = predictor_cost[i];
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
  const double dense = 2 + kAdded, exact = 1 + kListed * open + kAddedOfList * active;
  const double needed = std::min(open, selected);
  const double predicted = layer.predictor_cost + kListed * (selected + needed) + kAddedOfList * active;
  if (predicts_ && layer.predictor_cost > 0 && predicted < std::min(dense, exact)) return Mode::predicted;
  return exact < dense ? Mode::exact : Mode::dense;
}

}  // namespace turbosparse
