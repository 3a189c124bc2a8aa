// SPDX-License-Identifier: Apache-2.0
// How a sequence whose mode is automatic computes each layer: as the rates of its first decoded tokens suggest.
//
// Only counts decide, never the clock, and only those of the sequence itself: the same tokens lead to the same choices
// with any number of threads and beside any other sequences.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace turbosparse {

enum class Mode { dense, exact, predicted, automatic, automatic_predicted };

constexpr bool automatic(Mode mode) { return mode == Mode::automatic || mode == Mode::automatic_predicted; }

class Choice {
 public:
  // `neurons`: that a token computes in a layer, and how many of them share a gate and an up. `predictor_cost`: of each
  // layer, over its gate; 0 where it has no predictor. `by_gate`: gates, all of which are read, are what predicts in
  // every layer.
  Choice(int64_t neurons, int64_t per_gate, int64_t per_up, const std::vector<double>& predictor_cost, bool by_gate);

  Mode of(int64_t layer) const { return chosen_[layer]; }  // exact while it is still counting
  bool counting() const { return tokens_ < kTokens; }

  // What a token does in a part of a layer; from any thread.
  void count(int64_t layer, int64_t open, int64_t active, int64_t selected);
  // Around every token. `predicts`: layers may be predicted; a change of this begins the count again.
  void begin_token(bool predicts);
  void finish_token();
  void reset();

 private:
  static constexpr int64_t kTokens = 16;
  struct Layer {
    std::atomic<int64_t> open{0}, active{0}, selected{0};
    double predictor_cost = 0;
  };
  Mode cheapest(const Layer& layer) const;

  int64_t neurons_, tokens_ = 0;
  double gate_cost_, up_cost_;  // of a neuron, where its row of down costs 1
  bool by_gate_, predicts_ = false;
  std::vector<Layer> layers_;
  std::vector<Mode> chosen_;
};

}  // namespace turbosparse
