// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace turbosparse {

// How fast this machine reads memory: the best of several passes over a buffer of `bytes`, in 10^9 bytes a second. The
// buffer should be at least twice the last-level cache. Throws std::bad_alloc.
double read_bandwidth(size_t bytes, int threads, int passes);

}  // namespace turbosparse
