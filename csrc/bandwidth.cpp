// SPDX-License-Identifier: Apache-2.0
#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "team.h"

namespace turbosparse {
namespace {

// Sum of all words; eight chains, so that additions do not hold up the loads.
uint64_t read_all(const uint64_t* words, int64_t n) {
  uint64_t sum[32] = {};
  for (int64_t i = 0; i + 32 <= n; i += 32) {
    for (int j = 0; j < 32; ++j) sum[j] += words[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t s : sum) total += s;
  return total;
}

}  // namespace

double read_bandwidth(size_t bytes, int threads, int passes) {
  const Mapping buffer(bytes / 4096 * 4096 + 4096);
  const auto* words = reinterpret_cast<const uint64_t*>(buffer.data());
  const auto n = static_cast<int64_t>(buffer.size() / 8);
  Team team(threads);
  // Pages that were never written are one shared page of zeros: write them, each by the thread that will read it.
  team.run([&](Member& member) {
    const auto [first, last] = member.part(n, 512);
    std::memset(buffer.data() + first * 8, 1, (last - first) * 8);
  });
  std::atomic<uint64_t> sink{0};
  double best = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    team.run([&](Member& member) {
      const auto [first, last] = member.part(n, 512);
      sink += read_all(words + first, last - first);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(n) * 8 / took.count() / 1e9);
  }
  return sink.load() == 1 ? 0 : best;
}

}  // namespace turbosparse
