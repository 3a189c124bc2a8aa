// SPDX-License-Identifier: Apache-2.0
// The two feed-forward blocks: of dense models, and of those that compute only neurons that fire. A layer has a list of
// FFNs, one or some experts; routing.h says which of them compute a row, and what they put out is added in their order.
//
// A sparse FFN is a sum over neurons. They are split into fixed blocks (model.h); a block sums its neurons, in
// integers or in their order, into a partial vector of its own, and partials are added in the order of blocks. A neuron
// that is left out because its h is zero would have added zero, so that changes no bit.
#include <algorithm>
#include <cmath>

#include "forward.h"

namespace turbosparse {

namespace {

// Rows of a pass from which on one sum for all of them, which reads weights in columns, beats a sum for each.
constexpr int64_t kTogether = 5;

// The activation's dead zone: h, or zero where it is smaller than the layer's threshold.
float above(float h, float threshold) { return std::fabs(h) < threshold ? 0.0f : h; }

// Each of n values `times` times, side by side.
void repeat(const float* values, int64_t n, int64_t times, float* out) {
  for (int64_t i = 0; i < n; ++i) out = std::fill_n(out, times, values[i]);
}

// Each of n values, and beside it with the other sign.
void mirror(const float* values, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[2 * i] = values[i];
    out[2 * i + 1] = -values[i];
  }
}

}  // namespace

// Which FFN computes which row, into the scratch of every member, and the inputs of the rows in the order of the slots.
Forward::Inputs Forward::route(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  Scratch& s = scratch_[member.rank()];
  Routing& routing = s.routing;
  Inputs x = normed(member, pass.n, layer.ffn_norm, layer.ffns[0].gate);
  if (layer.router.rows == 0) {
    routing.all(pass.n);
  } else {
    multiply(member, layer.router, x, router_.data(), config_.experts);
    member.barrier();
    routing.choose(router_.data(), pass.n, config_.experts, config_.experts_used);
    if (pass.n > 1) {
      x = prepare(member, routing.slots(), layer.ffns[0].gate, residual_.data(), config_.hidden, layer.ffn_norm, kMain,
                  routing.row.data());
    }
  }
  s.slots.clear();
  for (const int32_t row : routing.row) s.slots.push_back(pass.rows[row]);
  if (counts_ && member.rank() == 0) {
    for (const Routing::Group& group : routing.groups) {
      counts_->routed[index * config_.ffns() + group.expert] += group.n;
    }
  }
  return x;
}

// residual += what the FFNs put out (update_, a row a slot), in the order of slots.
void Forward::add_outputs(Member& member, const Routing& routing, const float* post_norm) {
  if (post_norm) {  // of one FFN: a slot is a row
    norm_into_residual(member, routing.slots(), post_norm);
    return;
  }
  const int64_t d = config_.hidden;
  const auto [first, last] = member.part(d, 16);
  for (int64_t i = 0; i < routing.slots(); ++i) {
    const float *output = &update_[i * d], weight = routing.weight[i];
    float* residual = &residual_[routing.row[i] * d];
    for (int64_t c = first; c < last; ++c) residual[c] += weight * output[c];
  }
  member.barrier();
}

void Forward::dense_ffn(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  Scratch& s = scratch_[member.rank()];
  const int64_t f = config_.ffn;
  const Inputs x = route(member, pass, index);
  for (const Routing::Group& group : s.routing.groups) {
    const Ffn& ffn = layer.ffns[group.expert];
    const Inputs mine = x.of(group);
    float *gate = gates() + group.first * f, *up = ups() + group.first * f;
    share_rows(member, ffn.gate, mine, [&](int64_t first, int64_t last) {
      s.clock.enter(Phase::gate);
      product(s, ffn.gate, first, last, mine, gate, f);
      s.clock.enter(Phase::up);
      product(s, ffn.up, first, last, mine, up, f);
      s.clock.enter(Phase::other);
      combine(group, index, first, last, gate, up);
    });
  }
  member.barrier();
  const Inputs h = prepare(member, s.routing.slots(), layer.ffns[0].down, gates(), f, nullptr);
  enter(member, Phase::down);
  for (const Routing::Group& group : s.routing.groups) {
    multiply(member, layer.ffns[group.expert].down, h.of(group), &update_[group.first * config_.hidden],
             config_.hidden);
  }
  member.barrier();
  add_outputs(member, s.routing, layer.post_ffn_norm);
}

// h of neurons [first, last) of a group's rows, in the place of their gates.
void Forward::combine(const Routing::Group& group, int64_t index, int64_t first, int64_t last, float* gate,
                      const float* up) {
  const int64_t f = config_.ffn, base = (index * config_.ffns() + group.expert) * f;
  const auto h_of = config_.activation == Activation::swiglu ? kernels_.swiglu : kernels_.geglu;
  for (int64_t t = 0; t < group.n; ++t) {
    float* g = gate + t * f + first;
    const float* u = up + t * f + first;
    if (counts_) {
      for (int64_t j = 0; j < last - first; ++j) {
        counts_->gate[base + first + j] += g[j] > 0;
        counts_->up[base + first + j] += u[j] > 0;
      }
    }
    h_of(g, u, last - first, g);
    if (counts_) {
      for (int64_t j = 0; j < last - first; ++j) counts_->h[base + first + j] += g[j] != 0;
    }
  }
}

void Forward::sparse_ffn(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  Scratch& s = scratch_[member.rank()];
  const Inputs x = route(member, pass, index);
  const bool predicts = scores_wanted(pass, index);
  const Inputs hidden = predicts && !config_.gates_predict() ? predictor_hidden(member, pass, layer, x) : Inputs{};
  const auto rows_of = [&](const Routing::Group& group) {
    Pass part = pass;
    part.rows = &s.slots[group.first];
    part.n = group.n;
    return part;
  };
  for (const Routing::Group& group : s.routing.groups) {
    const Whole whole = whole_of(rows_of(group), index, predicts);
    whole_products(member, layer.ffns[group.expert], whole, group, x.of(group), hidden.of(group));
  }
  member.barrier();
  enter(member, Phase::other);
  const int64_t blocks = model_->neuron_blocks(), groups = static_cast<int64_t>(s.routing.groups.size());
  share(member, blocks * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const Routing::Group& group = s.routing.groups[task / blocks];
      const Pass part = rows_of(group);
      neuron_block(s, part, index, group, task % blocks, x.of(group), whole_of(part, index, predicts));
    }
  });
  member.barrier();
  reduce_blocks(member, s.routing.slots());
  add_outputs(member, s.routing, layer.post_ffn_norm);
}

// Counting needs everything.
Forward::Whole Forward::whole_of(const Pass& pass, int64_t index, bool predicts) const {
  Whole whole{predicts, counts_ != nullptr || (predicts && config_.gates_predict()), counts_ != nullptr};
  for (int64_t t = 0; t < pass.n; ++t) {
    const Mode mode = mode_of(pass, t, index);
    whole.gates = whole.gates || mode != Mode::predicted;
    // In a prompt, most rows of up are needed by some token.
    whole.ups = whole.ups || mode == Mode::dense || (mode == Mode::exact && !pass.decode);
  }
  return whole;
}

// What is computed for all neurons, whatever their blocks: the longer a run of rows, the faster memory serves it.
void Forward::whole_products(Member& member, const Ffn& ffn, const Whole& whole, const Routing::Group& group,
                             const Inputs& x, const Inputs& hidden) {
  const int64_t per_gate = config_.neurons_per_gate;
  if (whole.scores && ffn.fc2.rows > 0) {
    enter(member, Phase::predictor);
    multiply(member, ffn.fc2, hidden, scores() + group.first * config_.ffn, config_.ffn);
  }
  if (whole.gates) {
    enter(member, Phase::gate);
    whole_rows(member, ffn.gate, per_gate, group, x, shared_gates(), gates(),
               [&](const float* values, int64_t n, float* out) { repeat(values, n, per_gate, out); });
  }
  if (whole.ups) {
    enter(member, Phase::up);
    whole_rows(member, ffn.up, config_.neurons_per_up(), group, x, shared_ups(), ups(), mirror);
  }
}

// Products of `w` for every neuron, into `all`. A row that serves `times` neurons is computed once, into `once`, and
// spread(values, n, out) gives them what each has of it, so that the rest need not know.
template <class Spread>
void Forward::whole_rows(Member& member, const Matrix& w, int64_t times, const Routing::Group& group, const Inputs& x,
                         float* once, float* all, Spread spread) {
  const int64_t f = config_.ffn;
  float* out = all + group.first * f;
  if (times == 1) {
    multiply(member, w, x, out, f);
    return;
  }
  float* shared = once + group.first * w.rows;
  multiply(member, w, x, shared, w.rows, [&](int64_t first, int64_t last) {
    for (int64_t t = 0; t < group.n; ++t) {
      spread(shared + t * w.rows + first, last - first, out + t * f + first * times);
    }
  });
}

// How a row computes a layer: dense, exact or predicted.
Mode Forward::mode_of(const Pass& pass, int64_t row, int64_t layer) const {
  Mode mode = pass.mode;
  if (automatic(mode)) mode = pass.decode ? pass.rows[row].session->choice_.of(layer) : Mode::exact;
  return mode == Mode::predicted && !model_->predicts(layer) ? Mode::exact : mode;
}

// Whether a pass shows what the predictor of a layer misses.
bool Forward::audits(const Pass& pass, int64_t layer) const {
  if (!pass.audit) return false;
  Pass again = pass;
  again.mode = pass.audited;
  return mode_of(again, 0, layer) == Mode::predicted;
}

bool Forward::scores_wanted(const Pass& pass, int64_t index) const {
  if (!model_->predicts(index)) return false;
  bool wanted = counts_ != nullptr || audits(pass, index);
  for (int64_t t = 0; t < pass.n; ++t) {
    const bool counting = pass.mode == Mode::automatic_predicted && pass.rows[t].session->choice_.counting();
    wanted = wanted || counting || mode_of(pass, t, index) == Mode::predicted;
  }
  return wanted;
}

// relu(fc1 x), as input of fc2, for every slot. `x` is the FFN's own input.
Forward::Inputs Forward::predictor_hidden(Member& member, const Pass& pass, const Layer& layer, const Inputs& x) {
  const Routing& routing = scratch_[member.rank()].routing;
  const int64_t rank = layer.ffns[0].fc1.rows, slots = routing.slots();
  const Inputs seen = config_.predictor_input == PredictorInput::normed
                          ? x
                          : prepare(member, pass.n == 1 ? 1 : slots, layer.ffns[0].fc1, residual_.data(),
                                    config_.hidden, nullptr, kPredictor, routing.row.data());
  enter(member, Phase::predictor);
  for (const Routing::Group& group : routing.groups) {
    float* out = &predictor_hidden_[group.first * rank];
    multiply(member, layer.ffns[group.expert].fc1, seen.of(group), out, rank, [&](int64_t first, int64_t last) {
      for (int64_t t = 0; t < group.n; ++t) {
        for (int64_t r = first; r < last; ++r) {
          float& value = out[t * rank + r];
          value = value > 0 ? value : 0;
        }
      }
    });
  }
  member.barrier();
  return prepare(member, slots, layer.ffns[0].fc2, predictor_hidden_.data(), rank, nullptr, kPredictor);
}

// One block of neurons for all rows of a group; what several rows need is in a cache after the first.
void Forward::neuron_block(Scratch& s, const Pass& pass, int64_t index, const Routing::Group& group, int64_t block,
                           const Inputs& x, const Whole& whole) {
  const Ffn& ffn = model_->layers()[index].ffns[group.expert];
  const int64_t size = model_->neuron_block(), first = block * size, last = std::min(first + size, config_.ffn);
  const Neurons at{ffn, index, group.expert, group.first, block, first, last - first, whole};
  if (pass.n > 1) std::fill(s.seen.begin(), s.seen.end(), uint8_t{0});
  for (int64_t t = 0; t < pass.n; ++t) {
    float* partial = partial_of(at.slot + t, block);
    std::fill(partial, partial + config_.hidden, 0.0f);
    if (counts_) count_row(pass, at, t);
    fire(s, pass, at, t, x);
  }
  if (sums_together(pass, ffn.down)) {
    s.clock.enter(Phase::down);
    kernels_.sum_rows(ffn.down, first, last, row_of(gates(), at, 0), config_.ffn, pass.n, partial_of(at.slot, block),
                      model_->neuron_blocks() * config_.hidden);
    s.clock.enter(Phase::other);
  }
}

// The neurons of a row that fire, added to its partial sum.
void Forward::fire(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x) {
  const Mode mode = mode_of(pass, row, at.index);
  const int64_t selected = at.whole.scores ? select(s, pass, at, row) : 0;
  const int64_t open = open_gates(s, pass, at, row, x, mode == Mode::predicted ? selected : -1);
  if (at.whole.ups) {
    const float* up = row_of(ups(), at, row);
    for (int64_t i = 0; i < open; ++i) s.value[i] = up[s.open[i]];
  } else {
    listed_ups(s, pass, at, row, x, open);
  }
  // h of the open neurons; those that are not zero move to the front.
  const bool relu_up = config_.activation == Activation::drelu;
  int64_t active = 0;
  for (int64_t i = 0; i < open; ++i) {
    float u = s.value[i];
    if (relu_up && !(u > 0)) u = 0;
    const float h = above(s.gate_open[i] * u, at.ffn.least_value);
    s.listed[active] = static_cast<int32_t>(at.first) + s.open[i];
    s.value[active] = h;
    active += h != 0;
  }
  if (audits(pass, at.index)) {
    const float* margin = row_of(scores(), at, row);
    for (int64_t i = 0; i < active; ++i) {
      const int64_t neuron = s.listed[i];
      pass.audit->note(at.index, at.slot + row, neuron, margin[neuron - at.first], s.value[i]);
    }
  }
  s.traffic.active_neurons += active;
  s.traffic.open_gates += open;
  if (mode == Mode::predicted) s.traffic.selected_neurons += selected;
  if (automatic(pass.mode) && pass.decode) {
    Choice& choice = pass.rows[row].session->choice_;
    if (choice.counting()) choice.count(at.index, open, active, selected);
  }
  if (mode == Mode::dense) active = list_every(s, at, active);
  s.clock.enter(mode == Mode::dense ? Phase::down : Phase::down_firing);
  count_read(s, pass, at.first, active, at.ffn.down, 2);
  if (sums_together(pass, at.ffn.down)) {
    std::copy_n(s.value.data(), at.n, row_of(gates(), at, row));
  } else if (at.ffn.down.largest) {
    kernels_.sum_listed(at.ffn.down, s.listed.data(), s.value.data(), active, at.n,
                        partial_of(at.slot + row, at.block));
  } else {
    kernels_.axpy_listed(at.ffn.down, s.listed.data(), s.value.data(), active, partial_of(at.slot + row, at.block));
  }
  s.clock.enter(Phase::other);
}

// Whether the rows of a pass leave their h in the place of their gates, to be summed up in one go: that needs every
// neuron of every row, and several rows.
bool Forward::sums_together(const Pass& pass, const Matrix& down) {
  return pass.n >= kTogether && pass.mode == Mode::dense && down.largest != nullptr;
}

// What the neurons of a row do, and what the predictor says of them; every gate and up is known.
void Forward::count_row(const Pass& pass, const Neurons& at, int64_t row) {
  const float *gates_of = row_of(gates(), at, row), *ups_of = row_of(ups(), at, row);
  const bool predicts = model_->predicts(at.index);
  const float* scores_of = config_.gates_predict() ? gates_of : row_of(scores(), at, row);
  const int64_t base = (at.index * config_.ffns() + at.expert) * config_.ffn + at.first;
  const bool relu_up = config_.activation == Activation::drelu;
  const float threshold = pass.rows[row].session->audit_.threshold(at.index, at.expert);
  for (int64_t i = 0; i < at.n; ++i) {
    const float gate = gates_of[i], up = ups_of[i];
    const float h = opens(gate) && (!relu_up || up > 0) ? above(gate * up, at.ffn.least_value) : 0.0f;
    const bool fires = h != 0;
    counts_->gate[base + i] += opens(gate);
    counts_->up[base + i] += up > 0;
    counts_->h[base + i] += fires;
    counts_->mass[base + i] += std::fabs(h);
    if (!predicts) continue;
    const bool selected = scores_of[i] >= threshold;
    counts_->selected[base + i] += selected;
    counts_->hit[base + i] += selected && fires;
    if (!selected) counts_->missed[base + i] += std::fabs(h);
  }
}

// update = sum of the blocks' partial sums, in block order, for every slot.
void Forward::reduce_blocks(Member& member, int64_t slots) {
  const int64_t d = config_.hidden, blocks = model_->neuron_blocks();
  const auto [first, last] = member.part(d, 16);
  for (int64_t t = 0; t < slots; ++t) {
    float* update = &update_[t * d];
    std::fill(update + first, update + last, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* partial = partial_of(t, b);
      for (int64_t c = first; c < last; ++c) update[c] += partial[c];
    }
  }
}

}  // namespace turbosparse
