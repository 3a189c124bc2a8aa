// SPDX-License-Identifier: Apache-2.0
// One sequence being read or written: what it has said, as keys and values, and how far it has come.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "audit.h"
#include "choice.h"
#include "kv_cache.h"
#include "model.h"

namespace turbosparse {

// How many tokens go through the layers together: of a prompt, or of sequences that are decoded side by side.
inline constexpr int64_t kMostRows = 64;

class Session {
 public:
  Session(std::shared_ptr<Model> model, int64_t context, WeightType cache_type)
      : model_(std::move(model)),
        context_(context < 1 ? throw std::invalid_argument("the context must hold at least one token") : context),
        cache_(model_->config(), model_->kernels(), cache_type, context, kMostRows),
        choice_(model_->config().ffns_used() * model_->config().ffn, model_->config().neurons_per_gate,
                model_->config().neurons_per_up(), model_->predictor_costs(), model_->config().gates_predict()),
        audit_(model_->config()) {}

  int64_t position() const { return position_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }  // that it holds
  int64_t context() const { return context_; }
  size_t cache_bytes() const { return cache_.bytes(); }
  const Choice& choice() const { return choice_; }
  const Audit& audit() const { return audit_; }
  void begin_audit(double share, uint64_t seed, std::vector<double> promised) {
    audit_.begin(share, seed, std::move(promised));
  }
  size_t layers() const { return model_->layers().size(); }
  // Forget all tokens from `position` on; what is kept has the bits that it had. Where a sliding layer has given up the
  // cells that the next token would need, everything is forgotten. Returns the position reached.
  int64_t truncate(int64_t position);

 private:
  friend class Forward;
  void advance(const int32_t* tokens, int64_t n) {
    tokens_.insert(tokens_.end(), tokens, tokens + n);
    position_ += n;
    furthest_ = std::max(furthest_, position_);
  }
  // Whether to draw the next token from the sketch of the head. After heads so flat that it did not pay, not for a
  // while.
  bool tries_sketch() {
    if (untried_ == 0) return true;
    --untried_;
    return false;
  }
  void report_sketch(bool paid) {
    constexpr int kMostDoublings = 6;
    flat_ = paid ? 0 : std::min(flat_ + 1, kMostDoublings);
    untried_ = (1 << flat_) - 1;
  }
  std::shared_ptr<Model> model_;
  int64_t context_, position_ = 0;
  std::vector<int32_t> tokens_;
  int64_t furthest_ = 0;  // the highest position since everything was forgotten: how far cells may be overwritten
  KvCache cache_;
  Choice choice_;               // of the automatic modes
  Audit audit_;                 // of predicted mode, with the thresholds
  int flat_ = 0, untried_ = 0;  // tokens in a row for which the sketch did not pay, and to go without it
};

}  // namespace turbosparse
