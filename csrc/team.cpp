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

using Clock = std::chrono::steady_clock;

// Wait until `value` is no longer `old`: spin, then sleep. Returns how long it slept.
std::chrono::nanoseconds wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return {};
    pause();
  }
  const auto start = Clock::now();
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  return Clock::now() - start;
}

// The other side of it: count `value` up and wake who sleeps. In sequential order with libstdc++'s question whether
// anybody sleeps: a store that were still on its way when that is asked could be missed by one who falls asleep.
void change(std::atomic<uint32_t>& value) {
  value.fetch_add(1, std::memory_order_seq_cst);
  value.notify_all();
}

}  // namespace

void Member::barrier() {
  if (clock_) clock_->begin_waiting();
  slept_ += team_.arrive_and_wait(size_);
  if (clock_) clock_->end_waiting();
}

std::pair<int64_t, int64_t> Member::part(int64_t total, int64_t align) const {
  const int64_t units = (total + align - 1) / align;
  const int64_t first = units * rank_ / size_ * align;
  const int64_t last = units * (rank_ + 1) / size_ * align;
  return {std::min(first, total), std::min(last, total)};
}

Team::Team(int size) : size_(size), workers_(std::make_unique<Worker[]>(size)) {
  for (int rank = 1; rank < size_; ++rank) threads_.emplace_back([this, rank] { work(rank); });
}

Team::~Team() {
  stop_.store(true, std::memory_order_relaxed);
  for (int rank = 1; rank < size_; ++rank) {
    change(workers_[rank].jobs);
  }
  for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(Member&)>& job, int size) {
  job_ = &job;
  job_size_ = size;
  const auto start = Clock::now();
  for (int rank = 1; rank < size; ++rank) {
    change(workers_[rank].jobs);
  }
  Member self(*this, 0, size);
  job(self);
  self.barrier();
  std::chrono::nanoseconds longest = self.slept_;
  for (int rank = 1; rank < size; ++rank) longest = std::max(longest, workers_[rank].slept);
  stalled_ = std::chrono::duration<double>(longest) / (Clock::now() - start);
}

void Team::work(int rank) {
  Worker& worker = workers_[rank];
  uint32_t seen = 0;
  while (true) {
    wait_for_change(worker.jobs, seen);
    ++seen;
    if (stop_.load(std::memory_order_relaxed)) return;
    Member self(*this, rank, job_size_);
    (*job_)(self);
    worker.slept = self.slept_;  // read by the caller once this barrier is passed
    arrive_and_wait(self.size());
  }
}

std::chrono::nanoseconds Team::arrive_and_wait(int size) {
  if (size == 1) return {};
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    change(phase_);
    return {};
  }
  return wait_for_change(phase_, phase);
}

}  // namespace turbosparse
