// SPDX-License-Identifier: Apache-2.0
// Where the time of decoding goes. Every moment of a member of the team belongs to one phase, and so does every byte
// that it reads; waiting at a barrier belongs to the phase that ends there, and is counted by itself too.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>

namespace turbosparse {

enum class Phase {
  qkv,
  attention,
  attention_output,
  predictor,
  gate,
  gate_selected,
  up,
  up_open,
  down,
  down_firing,
  head,
  other  // embedding, norms, routing, choosing neurons, sums of partial results, and waiting for these
};
inline constexpr std::array kPhaseNames = {"qkv",           "attention", "attention_output", "predictor", "gate",
                                           "gate_selected", "up",        "up_open",          "down",      "down_firing",
                                           "head",          "other"};
inline constexpr size_t kPhases = kPhaseNames.size();

// Sums over tokens: nanoseconds as they pass on the wall (the mean of the members), bytes of all members.
struct PhaseTimes {
  struct Sums {
    int64_t nanoseconds = 0, waited = 0, bytes = 0;
  };
  std::array<Sums, kPhases> phases;

  Sums& operator[](Phase phase) { return phases[static_cast<size_t>(phase)]; }

  // What one of `members` took.
  void add(const PhaseTimes& member, int members) {
    for (size_t p = 0; p < kPhases; ++p) {
      phases[p].nanoseconds += member.phases[p].nanoseconds / members;
      phases[p].waited += member.phases[p].waited / members;
      phases[p].bytes += member.phases[p].bytes;
    }
  }
};

// The clock of one member. While it is off, a call costs a comparison.
class PhaseClock {
 public:
  void start(bool on) {
    on_ = on;
    if (!on_) return;
    times_ = PhaseTimes{};
    phase_ = Phase::other;
    since_ = Clock::now();
  }
  void enter(Phase phase) {
    if (!on_) return;
    lap();
    phase_ = phase;
  }
  void read(int64_t bytes) {
    if (on_) times_[phase_].bytes += bytes;
  }
  // Around a barrier.
  void begin_waiting() { enter(phase_); }
  void end_waiting() {
    if (on_) times_[phase_].waited += lap();
  }
  const PhaseTimes& times() const { return times_; }

 private:
  using Clock = std::chrono::steady_clock;

  // Nanoseconds since the last lap, which go to the phase that it is in.
  int64_t lap() {
    const auto now = Clock::now();
    const int64_t took = std::chrono::duration_cast<std::chrono::nanoseconds>(now - since_).count();
    times_[phase_].nanoseconds += took;
    since_ = now;
    return took;
  }

  bool on_ = false;
  Phase phase_ = Phase::other;
  Clock::time_point since_;
  PhaseTimes times_;
};

}  // namespace turbosparse
