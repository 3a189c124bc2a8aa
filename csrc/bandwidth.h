// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "team.h"

namespace turbosparse {

// How fast `members` of a team read every byte of `parts` once, each its share of each part, in 10^9 bytes a second.
double read_rate(Team& team, int members, const std::vector<std::span<const std::byte>>& parts);

// How fast this machine reads memory: the best of several passes over a buffer of `bytes`, in 10^9 bytes a second. The
// buffer should be at least twice the last-level cache. Throws std::bad_alloc.
double read_bandwidth(size_t bytes, int threads, int passes);

}  // namespace turbosparse
