// SPDX-License-Identifier: Apache-2.0
// Work handed out in pieces that shrink towards its end: a member that memory serves faster gets more of it, and all of
// them finish together. Which member computes a row changes none of its bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

namespace turbosparse {

// Every member asks for pieces of works in the same order, until it gets an empty one; then that work has been handed
// out whole, and the member may ask for the next one while others are still at it.
class Pieces {
 public:
  // A piece [first, last) of [0, total), total < 2^32, a multiple of `least` long but for the last. `work` numbers the
  // works, one after the other.
  std::pair<int64_t, int64_t> next(uint32_t work, int64_t total, int64_t least, int members) {
    uint64_t state = state_.load(std::memory_order_relaxed);
    while (true) {
      const auto at = static_cast<uint32_t>(state >> 32);
      if (static_cast<int32_t>(at - work) > 0) return {total, total};  // others are further
      const int64_t first = at == work ? static_cast<uint32_t>(state) : 0;
      if (first >= total) return {total, total};
      const int64_t size = std::max((total - first) / (2 * members), int64_t{1});
      const int64_t last = std::min(first + (size + least - 1) / least * least, total);
      const uint64_t wanted = static_cast<uint64_t>(work) << 32 | static_cast<uint64_t>(last);
      if (state_.compare_exchange_weak(state, wanted, std::memory_order_relaxed)) return {first, last};
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> state_{0};  // number of a work, and how much of it is handed out
};

}  // namespace turbosparse
