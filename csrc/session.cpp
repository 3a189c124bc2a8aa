// SPDX-License-Identifier: Apache-2.0
#include "session.h"

namespace turbosparse {

int64_t Session::truncate(int64_t position) {
  if (position < 0 || position > position_) throw std::invalid_argument("the cache does not reach that far");
  if (position == position_) return position_;
  position_ = cache_.holds_until(position, furthest_) ? position : 0;
  tokens_.resize(static_cast<size_t>(position_));
  if (position_ == 0) {
    furthest_ = 0;
    audit_.restart();
  }
  choice_.reset();
  return position_;
}

}  // namespace turbosparse
