// SPDX-License-Identifier: Apache-2.0
// Predicted mode watched by itself: some tokens of a sequence are computed exactly too, which shows what predictors
// miss, and thresholds that no longer keep what was promised are moved.
//
// Everything follows from the sequence's tokens and a seed: which tokens are audited, what is found, what is moved.
#pragma once

#include <cstdint>
#include <vector>

#include "model.h"

namespace turbosparse {

// What an audited token says, over all layers that were predicted.
struct Verdict {
  int64_t position;
  double recall;  // of the neurons that fire, the share that is selected
  double kept;    // of the sum of |h|, the share that the selected ones hold
  double kl;      // nats, of the predicted probabilities from the exact ones
};

// Sums over the audited tokens, of one layer.
struct LayerVerdict {
  int64_t fired = 0, hit = 0;
  double mass = 0, kept = 0;
};

// Thresholds of a layer that were moved: before, the audits since the last move kept `kept` of the mass on average.
struct Move {
  int64_t position, layer;
  double kept;
  double by;  // what was added to the thresholds
};

class Audit {
 public:
  explicit Audit(const Config& config);

  // From now on audit a `share` of the tokens, 0 for none, and keep the thresholds of every layer such that it keeps
  // its own share of the mass, `promised` [layers], each below 1; 0: leave them as they are.
  void begin(double share, uint64_t seed, std::vector<double> promised);
  // Forget what was moved, as a new text does; figures stay.
  void restart();

  bool due(int64_t position) const;
  float threshold(int64_t layer, int64_t expert) const { return thresholds_[layer * ffns_ + expert]; }

  // Around an exact pass over one token. note(): neuron `neuron` of slot `slot` fires with h and its score is `margin`
  // over the number before the threshold, so it is selected where that is positive. From any thread.
  void open();
  void note(int64_t layer, int64_t slot, int64_t neuron, float margin, float h) {
    noted_[(layer * slots_ + slot) * ffn_ + neuron] = {margin, h < 0 ? -h : h};
  }
  // logits [vocab] of both passes.
  void close(int64_t position, const float* exact, const float* predicted, int64_t vocab);

  const std::vector<Verdict>& verdicts() const { return verdicts_; }
  const std::vector<LayerVerdict>& layers() const { return layers_; }
  const std::vector<Move>& moves() const { return moves_; }

 private:
  struct Noted {
    float margin, mass;
  };
  // What is known of a layer since its thresholds were moved.
  struct Recent {
    std::vector<double> kept;    // of each audit
    std::vector<Noted> neurons;  // that fired in the last of them
    std::vector<size_t> ends;    // of each audit in `neurons`
  };
  LayerVerdict judge(int64_t layer);
  bool drifts(int64_t layer) const;
  void move(int64_t layer, int64_t position);

  int64_t n_layers_, ffns_, slots_, ffn_;
  std::vector<float> promised_thresholds_, thresholds_;  // the file's, and those in use: [layers, ffns]
  double share_ = 0;
  std::vector<double> promised_;  // [layers]
  uint64_t seed_ = 0;
  std::vector<Noted> noted_;  // [layers, slots, ffn]; no mass where nothing fires
  std::vector<Recent> recent_;
  std::vector<Verdict> verdicts_;
  std::vector<LayerVerdict> layers_;
  std::vector<Move> moves_;
};

// Kullback-Leibler divergence KL(p || q) in nats of the probabilities that two vectors of logits [n] mean.
double divergence(const float* p, const float* q, int64_t n);

}  // namespace turbosparse
