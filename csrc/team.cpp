// SPDX-License-Identifier: Apache-2.0
#include "team.h"

#include <algorithm>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace turbosparse {
namespace {

// About 50 us: several times the longest wait between two members that both have a core.
constexpr int kSpins = 1500;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Wait until `value` is no longer `old`: spin, then sleep.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

void Member::barrier() { team_.arrive_and_wait(); }

std::pair<int64_t, int64_t> Member::part(int64_t total, int64_t align) const {
  const int64_t units = (total + align - 1) / align;
  const int64_t first = units * rank_ / size_ * align;
  const int64_t last = units * (rank_ + 1) / size_ * align;
  return {std::min(first, total), std::min(last, total)};
}

Team::Team(int size) : size_(size) {
  for (int rank = 1; rank < size_; ++rank) threads_.emplace_back([this, rank] { work(rank); });
}

Team::~Team() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(Member&)>& job) {
  Member self(*this, 0, size_);
  if (size_ == 1) {
    job(self);
    return;
  }
  job_ = &job;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  job(self);
  arrive_and_wait();
}

void Team::work(int rank) {
  Member self(*this, rank, size_);
  uint32_t seen = 0;
  while (true) {
    wait_for_change(generation_, seen);
    ++seen;
    if (stop_.load(std::memory_order_relaxed)) return;
    (*job_)(self);
    arrive_and_wait();
  }
}

void Team::arrive_and_wait() {
  if (size_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase);
  }
}

}  // namespace turbosparse
