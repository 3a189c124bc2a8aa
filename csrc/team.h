// SPDX-License-Identifier: Apache-2.0
// A team of threads that runs one function at a time, every member the whole of it (SPMD), with barriers inside.
//
// A decode step has some two hundred barriers, so they spin; but only for as long as a well-served machine needs. A
// member that waits longer sleeps in the kernel: an idle engine uses no CPU, and a busy machine does not lose its cores
// to waiting.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

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

  // This member's part of [0, total), a multiple of `align` long but for the last part.
  std::pair<int64_t, int64_t> part(int64_t total, int64_t align = 1) const;

 private:
  Team& team_;
  int rank_, size_;
};

class Team {
 public:
  explicit Team(int size);  // >= 1, the caller's thread included
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Run `job` on every member; the caller is member 0. Returns when all are done. Not reentrant.
  void run(const std::function<void(Member&)>& job);

 private:
  friend class Member;
  void work(int rank);
  void arrive_and_wait();

  int size_;
  const std::function<void(Member&)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};  // counts jobs; workers wait for it to change
  alignas(64) std::atomic<uint32_t> phase_{0};       // counts barriers passed
  alignas(64) std::atomic<int32_t> arrived_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace turbosparse
