// SPDX-License-Identifier: Apache-2.0
// How far to draft, from what drafts and verifications cost on this machine and how often drafts came true in this
// text. The clock decides here, for what is written does not depend on it: only its speed does.
#pragma once

#include <array>
#include <cstdint>

namespace turbosparse {

// Where a draft comes from: found in the text by the length of what was found, or decoded in predicted mode.
enum class Source { one_token, two_tokens, few_tokens, many_tokens, predicted };
inline constexpr int kSources = 5;

// Of a lookup that found `length` tokens, at least 1.
Source source_of(int64_t length);

class Plan {
 public:
  static constexpr int64_t kMostDrafts = 15;

  // Drafts to verify of those that were looked up, at most `most`.
  int64_t drafts(Source source, int64_t most) const;
  // Drafts to decode in predicted mode where none were found, at most `most`. Now and then one is asked for only to
  // know what they are worth.
  int64_t predicted(int64_t most);

  // What happened: the seconds of a verification of `rows` tokens or of one predicted token, and whether a draft whose
  // predecessors came true did so itself.
  void verified(int64_t rows, double seconds);
  void drafted(double seconds);
  void judged(Source source, bool came_true);

  // For tests: always so many of those that are possible, looked up or, where nothing was found, predicted.
  void fix(int64_t found, int64_t predicted) { fixed_found_ = found, fixed_predicted_ = predicted; }

  // Share of drafts of this source that come true where those before them did, as it is now.
  double acceptance(Source source) const { return acceptance_[static_cast<int>(source)]; }

 private:
  double cost(int64_t rows) const;
  // The number of drafts up to `most` with the most expected tokens a second, if each takes `each` seconds to make.
  int64_t best(Source source, int64_t most, double each) const;

  std::array<double, kMostDrafts + 2> seconds_{};  // of a verification, by rows; 0: not measured
  double predicted_seconds_ = 0;
  std::array<double, kSources> acceptance_{0.4, 0.6, 0.7, 0.9, 0.9};
  int64_t unpredicted_ = 0;  // cycles since predicted drafts were tried
  int64_t fixed_found_ = -1, fixed_predicted_ = -1;
};

}  // namespace turbosparse
