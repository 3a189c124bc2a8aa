// SPDX-License-Identifier: Apache-2.0
// Which neurons of a block of a sparse FFN a row needs: those that a predictor selects, and whose gates are open. They
// are listed in order, and so are the rows of the matrices that serve them.
#include <cmath>

#include "forward.h"

namespace turbosparse {

// The open gates of a row, of all its neurons (`selected` < 0) or of the selected ones that s.open lists: s.open,
// counted from at.first, and their values s.gate_open. Returns how many.
int64_t Forward::open_gates(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x,
                            int64_t selected) {
  const float* gate = row_of(gates(), at, row);
  if (selected < 0) {
    const int64_t positive = kernels_.positive(gate, at.n, s.open.data());
    for (int64_t i = 0; i < positive; ++i) s.value[i] = gate[s.open[i]];
    return keep_open(s, positive);
  }
  if (at.whole.gates) {
    for (int64_t i = 0; i < selected; ++i) s.value[i] = gate[s.open[i]];
  } else {
    listed_gates(s, pass, at, row, x, selected);
  }
  return keep_open(s, selected);
}

// The gates of the first n of s.open, into s.value; one that neurons share is computed once.
void Forward::listed_gates(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x, int64_t n) {
  const int64_t per_gate = config_.neurons_per_gate, gates = list_rows(s, at, n, per_gate);
  s.clock.enter(Phase::gate_selected);
  count_read(s, pass, at.first / per_gate, gates, at.ffn.gate, 0);
  listed_product(s, at.ffn.gate, gates, x, row);
  s.clock.enter(Phase::other);
  if (gates < n) spread_rows(s, at, n, per_gate, gates);
}

// The ups of the first n of s.open, into s.value; one that two neurons share is computed once, and negated for the
// second of them: blocks begin with even neurons.
void Forward::listed_ups(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x, int64_t n) {
  const int64_t per_up = config_.neurons_per_up(), ups = list_rows(s, at, n, per_up);
  s.clock.enter(Phase::up_open);
  count_read(s, pass, at.first / per_up, ups, at.ffn.up, 1);
  listed_product(s, at.ffn.up, ups, x, row);
  s.clock.enter(Phase::other);
  if (!config_.mirrored_ups) return;
  spread_rows(s, at, n, per_up, ups);
  for (int64_t i = 0; i < n; ++i) s.value[i] = s.open[i] % 2 == 0 ? s.value[i] : -s.value[i];
}

// Of the n neurons of s.open, whose gates are s.value, those that are open move to the front. Returns how many.
int64_t Forward::keep_open(Scratch& s, int64_t n) const {
  int64_t open = 0;
  for (int64_t i = 0; i < n; ++i) {
    s.open[open] = s.open[i];
    s.gate_open[open] = s.value[i];
    open += opens(s.value[i]);
  }
  return open;
}

// s.open = the neurons whose score reaches the threshold, counted from at.first; scores become those less the number
// before it. Returns how many.
int64_t Forward::select(Scratch& s, const Pass& pass, const Neurons& at, int64_t row) {
  // score >= threshold is score > the number before it, and the difference of two floats is positive where they differ.
  const float below = std::nextafter(pass.rows[row].session->audit_.threshold(at.index, at.expert), -INFINITY);
  float* score = row_of(scores(), at, row);
  const float* found = config_.gates_predict() ? row_of(gates(), at, row) : score;
  for (int64_t i = 0; i < at.n; ++i) score[i] = found[i] - below;
  return kernels_.positive(score, at.n, s.open.data());
}

// s.listed = the rows of a matrix that serve the first n of s.open, each `per_row` neurons, among whom those of one row
// are neighbours. Returns how many. A row that serves two blocks is computed, and counted, in both.
int64_t Forward::list_rows(Scratch& s, const Neurons& at, int64_t n, int64_t per_row) {
  for (int64_t i = 0; i < n; ++i) s.listed[i] = static_cast<int32_t>(at.first) + s.open[i];
  if (per_row == 1) return n;
  const auto divisor = static_cast<int32_t>(per_row);
  int64_t rows = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t row = s.listed[i] / divisor;
    if (rows == 0 || s.listed[rows - 1] != row) s.listed[rows++] = row;
  }
  return rows;
}

// s.value, from those of the rows that s.listed names to those of the first n of s.open; the last ones first, as they
// move up.
void Forward::spread_rows(Scratch& s, const Neurons& at, int64_t n, int64_t per_row, int64_t rows) {
  const auto divisor = static_cast<int32_t>(per_row);
  for (int64_t i = n - 1, j = rows - 1; i >= 0; --i) {
    if ((static_cast<int32_t>(at.first) + s.open[i]) / divisor != s.listed[j]) --j;
    s.value[i] = s.value[j];
  }
}

// Dense mode adds every neuron up: the `active` ones that are listed, and zeros in the others' places.
int64_t Forward::list_every(Scratch& s, const Neurons& at, int64_t active) {
  for (int64_t i = active - 1, j = at.n - 1; j >= 0; --j) {
    const auto neuron = static_cast<int32_t>(at.first + j);
    const bool fires = i >= 0 && s.listed[i] == neuron;
    s.value[j] = fires ? s.value[i] : 0.0f;
    if (fires) --i;
    s.listed[j] = neuron;
  }
  return at.n;
}

// Bytes of the n listed rows of `w`, the which-th matrix of the FFN, where the block's rows begin at `first`; what an
// earlier row of the pass has read is free.
void Forward::count_read(Scratch& s, const Pass& pass, int64_t first, int64_t n, const Matrix& w, int which) {
  int64_t read = n;
  if (pass.n > 1) {
    uint8_t* seen = &s.seen[which * model_->neuron_block()];
    read = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint8_t& mark = seen[s.listed[i] - first];
      read += mark == 0;
      mark = 1;
    }
  }
  s.count_read(read * w.row_bytes);
}

}  // namespace turbosparse
