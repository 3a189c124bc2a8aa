// SPDX-License-Identifier: Apache-2.0
// How many members of a team are worth having right now.
//
// On a machine that does other work too, a member without a core is waited for by all others at every barrier, for
// milliseconds each time: two members on two cores that a third thread shares get less done than one member alone.
// So the pace drops a member when the team stalls, and tries again later. What is computed does not depend on it.
#pragma once

namespace turbosparse {

class Pace {
 public:
  explicit Pace(int most) : most_(most), size_(most) {}

  // Members for the next job, 1 to `most`.
  int size() const { return size_; }

  // `stalled`: share of the last job's time that its most patient member slept at barriers, 0..1.
  void report(double stalled);

 private:
  void change(int by);

  int most_, size_;
  int jobs_ = 0;         // since the size changed
  double average_ = 0;   // of the stalled share, over some eight jobs
  bool trying_ = false;  // the last change was upwards and has not proved itself yet
  int patience_ = 32;    // jobs before the next try
};

}  // namespace turbosparse
