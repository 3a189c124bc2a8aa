// SPDX-License-Identifier: Apache-2.0
// How far to draft, from what drafts and verifications cost on this machine and how often drafts came true in this
// text. The clock decides here, for what is written does not depend on it: only its speed does.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>

namespace turbosparse {

inline constexpr int64_t kMostDrafts = 15;

// What passes cost, of all sequences of an engine. Safe from several threads.
class Costs {
 public:
  // Seconds of a verification of `rows` tokens, and of one predicted token.
  void verified(int64_t rows, double seconds);
  void drafted(double seconds);

  // As they are now; what was not measured is hoped to be cheap, so that it is tried. 0: nothing is known yet.
  double of_verification(int64_t rows) const;
  double of_draft() const;

 private:
  double hoped(int64_t rows) const;

  mutable std::mutex lock_;
  std::array<double, kMostDrafts + 2> verification_{};  // by rows; 0: not measured
  double draft_ = 0;
};

class Plan {
 public:
  explicit Plan(Costs& costs) : costs_(costs) {}

  // Drafts to verify, at most `most`, of those that were looked up by the last `found` tokens, at least 1.
  int64_t looked_up(int64_t found, int64_t most) const;
  // Drafts to decode in predicted mode where none are looked up, at most `most`. Now and then one is asked for only to
  // know what they are worth.
  int64_t predicted(int64_t most);

  // A draft whose predecessors came true did so itself, or not: one that followed `found` tokens that are in the text
  // twice, or a predicted one (0).
  void judged(int64_t found, bool came_true);

  // For tests: always so many of those that are possible, looked up or, where these are none, predicted.
  void fix(int64_t looked_up, int64_t predicted) { fixed_looked_up_ = looked_up, fixed_predicted_ = predicted; }

 private:
  // The number of drafts up to `most` with the most expected tokens a second, if each takes `each` seconds to make.
  int64_t best(int64_t found, int64_t most, double each) const;

  Costs& costs_;
  // Share of the drafts that come true where those before them did: of predicted ones, and of those that are looked up
  // by 1, 2 to 3, 4 to 7, 8 to 15, 16 and more tokens. To begin with as in docs/experiments.md.
  std::array<double, 6> acceptance_{0.95, 0.33, 0.57, 0.8, 0.88, 0.96};
  int64_t unpredicted_ = 0;  // passes since predicted drafts were tried
  int64_t fixed_looked_up_ = -1, fixed_predicted_ = -1;
};

}  // namespace turbosparse
