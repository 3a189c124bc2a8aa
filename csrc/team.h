// SPDX-License-Identifier: Apache-2.0
// A team of threads that runs one function at a time, every member the whole of it (SPMD), with barriers inside.
//
// A decode step has some two hundred barriers, so they spin; but only for as long as a well-served machine needs. A
// member that waits longer sleeps in the kernel: an idle engine uses no CPU, and a busy machine does not lose its cores
// to waiting. How long they slept is measured; pace.h says what for.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "phases.h"

namespace turbosparse {

class Team;

// What a member knows of itself while it runs a job.
class Member {
 public:
  Member(Team& team, int rank, int size) : team_(team), rank_(rank), size_(size) {}
  int rank() const { return rank_; }
  int size() const { return size_; }

  // Wait until every member of the team has come here.
  void barrier();

  // From now on, tell `clock` of the waiting at barriers.
  void time_with(PhaseClock* clock) { clock_ = clock; }

  // This member's part of [0, total), a multiple of `align` long but for the last part.
  std::pair<int64_t, int64_t> part(int64_t total, int64_t align = 1) const;

 private:
  friend class Team;
  Team& team_;
  int rank_, size_;
  std::chrono::nanoseconds slept_{0};
  PhaseClock* clock_ = nullptr;
};

class Team {
 public:
  explicit Team(int size);  // >= 1, the caller's thread included
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Run `job` on the first `size` members, or on all; the caller is member 0. Returns when they are done. Not
  // reentrant.
  void run(const std::function<void(Member&)>& job) { run(job, size_); }
  void run(const std::function<void(Member&)>& job, int size);

  // Share of the last job's time that the member who slept longest at barriers slept, 0..1.
  double stalled() const { return stalled_; }

 private:
  friend class Member;
  // What one worker waits on and leaves behind; a cache line of its own.
  struct alignas(64) Worker {
    std::atomic<uint32_t> jobs{0};  // counts those it takes part in
    std::chrono::nanoseconds slept{0};
  };
  void work(int rank);
  // Barrier of the `size` members of the running job. (Not job_size_: it may be the next job's already when the last
  // to arrive has let everybody go.)
  std::chrono::nanoseconds arrive_and_wait(int size);

  int size_;
  const std::function<void(Member&)>* job_ = nullptr;
  int job_size_ = 1;  // members that run the job
  double stalled_ = 0;
  std::unique_ptr<Worker[]> workers_;
  alignas(64) std::atomic<uint32_t> phase_{0};  // counts barriers passed
  alignas(64) std::atomic<int32_t> arrived_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace turbosparse
