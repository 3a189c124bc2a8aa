// SPDX-License-Identifier: Apache-2.0
#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "memory.h"

namespace turbosparse {
namespace {

constexpr int64_t kAhead = 8192 / sizeof(uint64_t);  // words: as far as kernels fetch (FetchAhead in simd_drive.h)

// Sum of all words; eight chains, so that additions do not hold up the loads.
uint64_t read_all(const uint64_t* words, int64_t n) {
  uint64_t sum[32] = {};
  for (int64_t i = 0; i + 32 <= n; i += 32) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(words + i + kAhead + 8 * line, 0, 2);
    for (int j = 0; j < 32; ++j) sum[j] += words[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t s : sum) total += s;
  return total;
}

}  // namespace

double read_rate(Team& team, int members, const std::vector<std::span<const std::byte>>& parts) {
  constexpr int64_t kPage = 4096;
  std::atomic<uint64_t> sink{0};
  size_t bytes = 0;
  for (const auto& part : parts) bytes += part.size();
  const auto start = std::chrono::steady_clock::now();
  team.run(
      [&](Member& member) {
        for (const auto& part : parts) {
          const auto [first, last] = member.part(static_cast<int64_t>(part.size()), kPage);
          sink += read_all(reinterpret_cast<const uint64_t*>(part.data() + first), (last - first) / 8);
        }
      },
      members);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return static_cast<double>(bytes) / took.count() / 1e9;
}

double read_bandwidth(size_t bytes, int threads, int passes) {
  const Mapping buffer(bytes / 4096 * 4096 + 4096);
  const auto n = static_cast<int64_t>(buffer.size());
  Team team(threads);
  // Pages that were never written are one shared page of zeros: write them, each by the thread that will read it.
  team.run([&](Member& member) {
    const auto [first, last] = member.part(n, 4096);
    std::memset(buffer.data() + first, 1, last - first);
  });
  double best = 0;
  for (int pass = 0; pass < passes; ++pass) {
    best = std::max(best, read_rate(team, threads, {{buffer.data(), buffer.size()}}));
  }
  return best;
}

}  // namespace turbosparse
