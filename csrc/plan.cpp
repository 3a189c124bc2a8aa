// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <bit>

namespace turbosparse {
namespace {

constexpr double kHopedRow = 0.15;     // what one more row costs, of a single one, until it is measured
constexpr double kForget = 1.0 / 128;  // of a verification, by every other one: what was slow once is tried again
constexpr double kNewest = 1.0 / 8, kNewestVerdict = 1.0 / 32;
constexpr int64_t kTryPredicted = 128;  // passes

void average(double& known, double newest) { known = known == 0 ? newest : known + kNewest * (newest - known); }

// Which share a draft counts in: see Plan::acceptance_.
size_t kind_of(int64_t found) {
  return std::min<size_t>(static_cast<size_t>(std::bit_width(static_cast<uint64_t>(found))), 5);
}

}  // namespace

// From the nearest smaller verification that was measured.
double Costs::hoped(int64_t rows) const {
  int64_t known = rows - 1;
  while (known > 1 && verification_[known] == 0) --known;
  return verification_[known] + kHopedRow * static_cast<double>(rows - known) * verification_[1];
}

double Costs::of_verification(int64_t rows) const {
  const std::lock_guard<std::mutex> lock(lock_);
  return verification_[rows] > 0 || verification_[1] == 0 ? verification_[rows] : hoped(rows);
}

double Costs::of_draft() const {
  const std::lock_guard<std::mutex> lock(lock_);
  return draft_;
}

void Costs::verified(int64_t rows, double seconds) {
  const std::lock_guard<std::mutex> lock(lock_);
  average(verification_[rows], seconds);
  for (int64_t n = 2; n <= kMostDrafts + 1; ++n) {
    double& other = verification_[n];
    if (n != rows && other > 0) other += kForget * std::min(0.0, hoped(n) - other);
  }
}

void Costs::drafted(double seconds) {
  const std::lock_guard<std::mutex> lock(lock_);
  average(draft_, seconds);
}

int64_t Plan::best(int64_t found, int64_t most, double each) const {
  const double one = costs_.of_verification(1);
  if (one == 0) return 0;  // a single token comes first
  double expected = 1, chance = 1, best_rate = expected / one;
  int64_t best = 0;
  for (int64_t n = 1; n <= std::min(most, kMostDrafts); ++n) {
    chance *= acceptance_[kind_of(found > 0 ? found + n - 1 : 0)];
    expected += chance;
    const double rate = expected / (static_cast<double>(n) * each + costs_.of_verification(n + 1));
    if (rate > best_rate) best_rate = rate, best = n;
  }
  return best;
}

int64_t Plan::looked_up(int64_t found, int64_t most) const {
  return fixed_looked_up_ >= 0 ? std::min(fixed_looked_up_, most) : best(found, most, 0);
}

int64_t Plan::predicted(int64_t most) {
  if (fixed_predicted_ >= 0) return std::min(fixed_predicted_, most);
  if (most < 1 || costs_.of_verification(1) == 0) return 0;
  const bool unknown = costs_.of_draft() == 0;
  const int64_t n = unknown ? 0 : best(0, most, costs_.of_draft());
  unpredicted_ = n > 0 ? 0 : unpredicted_ + 1;
  if (!unknown && unpredicted_ < kTryPredicted) return n;
  unpredicted_ = 0;
  return std::max<int64_t>(n, 1);
}

void Plan::judged(int64_t found, bool came_true) {
  double& known = acceptance_[kind_of(found)];
  known += kNewestVerdict * ((came_true ? 1.0 : 0.0) - known);
}

}  // namespace turbosparse
