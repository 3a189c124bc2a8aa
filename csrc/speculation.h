// SPDX-License-Identifier: Apache-2.0
// Lossless decoding: tokens are drafted cheaply, and one exact pass over all of them says how many of them exact
// decoding would have drawn. A row of a pass has the bits that it has alone (forward.h), and draws depend on logits,
// seed and position: so the tokens are those of exact mode, and so are the keys and values that stay.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_set>
#include <vector>

#include "forward.h"
#include "plan.h"
#include "sampler.h"
#include "session.h"

namespace turbosparse {

// What speculation did so far.
struct Drafting {
  int64_t verifications = 0, tokens = 0;       // passes, and tokens that came of them
  int64_t looked_up = 0, looked_up_right = 0;  // drafts that were verified, and that came true
  int64_t predicted = 0, predicted_right = 0;
};

// For benchmarks only: what is drawn at a position, whatever the logits say, and whether a predicted draft agrees.
struct Script {
  std::vector<int32_t> tokens;  // of the whole text, by position
  std::vector<uint8_t> agrees;
};

class Speculation {
 public:
  // `predicts`: drafts may be decoded in predicted mode too. `dense`: the model has no exact mode but dense.
  Speculation(Forward& forward, Session& session, Costs& costs, bool predicts, bool dense)
      : forward_(forward),
        session_(session),
        costs_(costs),
        plan_(costs),
        predicts_(predicts),
        exact_(dense ? Mode::dense : Mode::exact) {}

  // Read `token`, which was drawn last; returns those that exact decoding draws after it, at least 1 and at most
  // `most`, and none after one of `ends`. The session then holds `token` and all of these but the last, and `logits`
  // [vocab] are those that the last was drawn from. Throws as Forward::read().
  std::vector<int32_t> next(int32_t token, int64_t most, const std::unordered_set<int32_t>& ends,
                            const SamplingParams& params, float* logits);

  Plan& plan() { return plan_; }
  const Drafting& drafting() const { return drafting_; }
  int64_t vocab() const { return forward_.vocab(); }
  void follow(Script script) { script_ = std::move(script); }

 private:
  struct Draft {
    int64_t found;                  // tokens that were looked up; 0: predicted
    std::vector<int32_t> foreseen;  // may be longer than what is verified: watching the rest costs nothing
    std::vector<int32_t> tokens;    // to verify
  };
  Draft draft(int32_t token, int64_t most, const std::unordered_set<int32_t>& ends, const SamplingParams& params);
  void predict(Draft& draft, int32_t token, int64_t most, const std::unordered_set<int32_t>& ends,
               const SamplingParams& params);
  int32_t draw(const float* logits, const SamplingParams& params, int64_t position, bool drafting) const;
  void judge(const Draft& draft, const std::vector<int32_t>& drawn);

  Forward& forward_;
  Session& session_;
  Costs& costs_;
  Plan plan_;
  bool predicts_;
  Mode exact_;
  Drafting drafting_;
  Script script_;
  std::vector<float> logits_;  // [rows, vocab]
};

}  // namespace turbosparse
