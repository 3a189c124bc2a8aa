// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>

namespace turbosparse {
namespace {

constexpr double kHopedRow = 0.1;     // what one more row costs, of a single one, until it is measured
constexpr double kForget = 1.0 / 64;  // per verification: what was slow once is tried again
constexpr double kNewest = 1.0 / 8, kNewestVerdict = 1.0 / 32;
constexpr int64_t kTryPredicted = 128;  // cycles

}  // namespace

Source source_of(int64_t length) {
  if (length == 1) return Source::one_token;
  if (length == 2) return Source::two_tokens;
  return length < 8 ? Source::few_tokens : Source::many_tokens;
}

double Plan::cost(int64_t rows) const {
  const double hoped = seconds_[1] * (1 + kHopedRow * static_cast<double>(rows - 1));
  return seconds_[rows] > 0 ? seconds_[rows] : hoped;
}

int64_t Plan::best(Source source, int64_t most, double each) const {
  if (seconds_[1] == 0) return 0;  // a single token comes first
  double expected = 1, chance = 1, best_rate = expected / cost(1);
  int64_t best = 0;
  for (int64_t n = 1; n <= std::min(most, kMostDrafts); ++n) {
    chance *= acceptance(source);
    expected += chance;
    const double rate = expected / (static_cast<double>(n) * each + cost(n + 1));
    if (rate > best_rate) best_rate = rate, best = n;
  }
  return best;
}

int64_t Plan::drafts(Source source, int64_t most) const {
  return fixed_found_ >= 0 ? std::min(fixed_found_, most) : best(source, most, 0);
}

int64_t Plan::predicted(int64_t most) {
  if (fixed_predicted_ >= 0) return std::min(fixed_predicted_, most);
  if (most < 1 || seconds_[1] == 0) return 0;
  const bool unknown = predicted_seconds_ == 0;
  const int64_t n = unknown ? 0 : best(Source::predicted, most, predicted_seconds_);
  unpredicted_ = n > 0 ? 0 : unpredicted_ + 1;
  if (!unknown && unpredicted_ < kTryPredicted) return n;
  unpredicted_ = 0;
  return std::max<int64_t>(n, 1);
}

void Plan::verified(int64_t rows, double seconds) {
  for (int64_t n = 2; n <= kMostDrafts + 1; ++n) {
    const double hoped = seconds_[1] * (1 + kHopedRow * static_cast<double>(n - 1));
    if (seconds_[n] > hoped && n != rows) seconds_[n] += kForget * (hoped - seconds_[n]);
  }
  double& known = seconds_[rows];
  known = known == 0 ? seconds : known + kNewest * (seconds - known);
}

void Plan::drafted(double seconds) {
  predicted_seconds_ =
      predicted_seconds_ == 0 ? seconds : predicted_seconds_ + kNewest * (seconds - predicted_seconds_);
}

void Plan::judged(Source source, bool came_true) {
  double& known = acceptance_[static_cast<int>(source)];
  known += kNewestVerdict * ((came_true ? 1.0 : 0.0) - known);
}

}  // namespace turbosparse
