// SPDX-License-Identifier: Apache-2.0
#include "pace.h"

#include <algorithm>

namespace turbosparse {
namespace {

constexpr double kTooLong = 0.25;  // a member that lost its core for a while stalls the others for about half the time
constexpr int kFewest = 4;         // jobs before a verdict: one hiccup is not a busy machine
constexpr int kProved = 32;        // jobs after which a larger team has proved itself
constexpr int kMostPatient = 1024;

}  // namespace

void Pace::change(int by) {
  size_ += by;
  jobs_ = 0;
  average_ = 0;
  trying_ = by > 0;
}

void Pace::report(double stalled) {
  ++jobs_;
  average_ += (stalled - average_) / 8;
  if (size_ > 1 && jobs_ >= kFewest && average_ > kTooLong) {
    patience_ = trying_ ? std::min(2 * patience_, kMostPatient) : kProved;
    change(-1);
  } else if (size_ < most_ && jobs_ >= patience_) {
    change(+1);
  } else if (trying_ && jobs_ >= kProved) {
    trying_ = false;
  }
}

}  // namespace turbosparse
