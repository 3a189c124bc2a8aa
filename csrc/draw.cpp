// SPDX-License-Identifier: Apache-2.0
// Drawing a token without most of its logits (sketch.h).
//
// All logits are read from the sketch. A member keeps the best of its rows, as if the sketch were right, and the exact
// logits of these leaders draw a line that the winner cannot be below. Rows that the bound of the sketch keeps below it
// are out of the draw; the others contend with their exact logits, which are those that all rows would get.
#include <algorithm>
#include <cmath>

#include "forward.h"
#include "kernels/pack.h"

namespace turbosparse {
namespace {

constexpr int64_t kMostContenders = 3;  // one row in so many; more cost as much as the whole head

// Whether the winner is the first one of a race. With min-p it is one of the likeliest, and without a temperature it is
// the likeliest.
bool races(const SamplingParams& params) { return params.temperature > 0 && params.min_p <= 0; }

}  // namespace

int32_t Forward::draw(Session& session, int32_t token, Mode mode, const SamplingParams& params) {
  check(token);
  const std::lock_guard<std::mutex> lock(model_->busy());
  check(session, 1, mode);
  const int64_t vocab = config_.vocab;
  const Row row{&session, session.position_, token};
  const auto position = static_cast<uint64_t>(session.position_) + 1;
  drawn_from_.resize(vocab);
  const bool filters = params.top_k > 0 || params.top_p < 1;  // which need the order of all logits
  const Sketch* sketch = filters ? nullptr : model_->sketch();
  if (!sketch || !session.tries_sketch()) {
    step(&row, 1, mode, drawn_from_.data(), nullptr);
    if (!filters) model_->prepare_sketch(scratch_[0].inputs[kMain].values.x.data());
    return sample(drawn_from_.data(), vocab, params, session.tokens_, position);
  }
  Draw draw{*sketch, params, position, {}};
  if (params.repetition_penalty != 1) {
    draw.penalised = session.tokens_;
    draw.penalised.push_back(token);
    std::sort(draw.penalised.begin(), draw.penalised.end());
    draw.penalised.erase(std::unique(draw.penalised.begin(), draw.penalised.end()), draw.penalised.end());
  }
  early_.resize(vocab);
  contenders_.resize(vocab + draw.penalised.size());
  contending_.resize(contenders_.size());
  std::copy(draw.penalised.begin(), draw.penalised.end(), contenders_.begin() + vocab);
  for (Scratch& s : scratch_) s.leader = -1, s.contenders = {0, 0};
  step(&row, 1, mode, drawn_from_.data(), &draw);
  if (!draw.whole) {
    session.report_sketch(true);
    return first_of_contenders(draw);
  }
  if (draw.flat) session.report_sketch(false);
  return sample(drawn_from_.data(), vocab, params, session.tokens_, position);
}

// The head for a token that is drawn.
void Forward::draw_head(Member& member, const Pass& pass) {
  Draw& draw = *pass.draw;
  const Inputs x = prepare(member, 1, model_->head(), residual_.data(), config_.hidden, model_->output_norm());
  const Inputs coarse = sketch_inputs(member, x);
  enter(member, Phase::head);
  const float length = draw.sketch.length(coarse.both());
  if (!bounded(draw, length)) return all_logits(member, x, drawn_from_.data());
  find_leaders(member, draw, coarse);
  member.barrier();
  Race race(draw.params, draw.position, 0);
  find_contenders(member, draw, line_of(member, draw, x, length, race));
  member.barrier();
  auto n = static_cast<int64_t>(draw.penalised.size());
  for (int rank = 0; rank < member.size(); ++rank) n += scratch_[rank].contenders.second;
  const bool flat = n == 0 || n * kMostContenders > config_.vocab;
  if (member.rank() == 0) draw.flat = draw.whole = flat;
  if (flat) return all_logits(member, x, drawn_from_.data());
  compute_contenders(member, draw, x, n);
}

// Whether all numbers on the way are numbers: then a row that is out has a logit that is one.
bool Forward::bounded(const Draw& draw, float length) const {
  const SamplingParams& params = draw.params;
  const float penalty = std::max(params.repetition_penalty, 1 / params.repetition_penalty);
  const float most = draw.sketch.largest() * length * penalty;
  return most < 1e30f && (params.temperature <= 0 || most / params.temperature < 1e30f);
}

// The bound holds for the vector that the rows of the head meet. Rows without blocks meet fp32, which one term of int8
// is too far from.
Forward::Inputs Forward::sketch_inputs(Member& member, const Inputs& x) {
  if (is_blocked(model_->head().type) || x.rest.count > 0) return x;
  InputRoom& room = scratch_[member.rank()].inputs[kMain];
  quantize_rest(room, 0, x.values.cols);
  return Inputs{x.values, room.rest.view(1, x.values.cols, true)};
}

void Forward::find_leaders(Member& member, const Draw& draw, const Inputs& x) {
  const bool racing = races(draw.params);
  int32_t likeliest = -1;
  float highest = -INFINITY;
  Race race(draw.params, draw.position, 0);
  float* logits = drawn_from_.data();
  multiply(member, draw.sketch.matrix(), x, logits, 0, [&](int64_t first, int64_t last) {
    // What was penalised contends in any case, with another logit.
    const auto begin = std::lower_bound(draw.penalised.begin(), draw.penalised.end(), first);
    for (auto id = begin; id != draw.penalised.end() && *id < last; ++id) logits[*id] = -INFINITY;
    if (racing) {
      for (auto id = static_cast<int32_t>(first); id < last; ++id) {
        early_[id] = race.early(id);
        race.enter_quickly(id, early_[id], capped(logits[id]) / draw.params.temperature);
      }
    } else if (const float most = kernels_.maximum(logits + first, last - first); most > highest) {
      highest = most;
      likeliest = static_cast<int32_t>(std::find(logits + first, logits + last, most) - logits);
    }
  });
  scratch_[member.rank()].leader = racing ? race.first() : likeliest;
}

// From the exact logits of the leaders, which enter `race`.
Forward::Line Forward::line_of(Member& member, const Draw& draw, const Inputs& x, float length, Race& race) {
  std::vector<int32_t> leaders;
  for (int rank = 0; rank < member.size(); ++rank) {
    if (scratch_[rank].leader >= 0) leaders.push_back(scratch_[rank].leader);
  }
  std::vector<float> logits(leaders.size());
  const Matrix& w = model_->head();
  const auto n = static_cast<int64_t>(leaders.size());
  kernels_.dot_listed(w, leaders.data(), n, x.both(), 0, logits.data());
  if (member.rank() == 0) scratch_[0].count_read(n * w.row_bytes);
  const float divisor = draw.params.temperature > 0 ? draw.params.temperature : 1;
  Line line{length, divisor, -INFINITY, races(draw.params) ? &race : nullptr};
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = capped(logits[i]) / divisor;
    race.enter(leaders[i], scaled);
    line.least = std::max(line.least, scaled);
  }
  if (draw.params.temperature > 0 && draw.params.min_p > 0) {
    const double share = std::log(static_cast<double>(draw.params.min_p)), least = line.least;
    line.least = static_cast<float>(least + share - 1e-5 * (1 + std::abs(least)));
  }
  return line;
}

// Lists the rows of a part that the bound does not keep below the line.
void Forward::find_contenders(Member& member, const Draw& draw, const Line& line) {
  constexpr int64_t kStep = 512, kAlign = 16;
  Scratch& s = scratch_[member.rank()];
  const auto [begin, end] = member.part(config_.vocab, kAlign);
  float over[kStep];
  int32_t listed[kStep];
  int64_t n = 0;
  for (int64_t first = begin; first < end; first += kStep) {
    const int64_t step = std::min(kStep, end - first);
    over_line(draw, line, first, step, over);
    const int64_t found = kernels_.positive(over, step, listed);
    for (int64_t i = 0; i < found; ++i) contenders_[begin + n++] = static_cast<int32_t>(first) + listed[i];
  }
  s.contenders = {begin, n};
  s.count_read((end - begin) * static_cast<int64_t>(sizeof(float)));
}

// over [n]: positive for each of the rows from `first` on that may win.
void Forward::over_line(const Draw& draw, const Line& line, int64_t first, int64_t n, float* over) const {
  const float *logits = &drawn_from_[first], *bounds = draw.sketch.bounds() + first;
  for (int64_t i = 0; i < n; ++i) over[i] = logits[i] + bounds[i] * line.length;
  for (int64_t i = 0; config_.logit_softcap > 0 && i < n; ++i) {
    const float most = capped(over[i]);  // by some units in the last place tanh may fall where its argument rises
    over[i] = most + (std::abs(most) * 0x1p-18f + 1e-30f);
  }
  if (line.race) {
    const float* early = &early_[first];
    for (int64_t i = 0; i < n; ++i) over[i] = line.race->reach(over[i] / line.divisor) - early[i];
  } else {
    const float least = std::nextafter(line.least, -INFINITY);
    for (int64_t i = 0; i < n; ++i) over[i] = over[i] / line.divisor - least;
  }
}

// The exact logits of all that contend: n of them, shared evenly, for they cluster.
void Forward::compute_contenders(Member& member, const Draw& draw, const Inputs& x, int64_t n) {
  constexpr int64_t kLeastBytes = 16 << 10;
  const Matrix& w = model_->head();
  Scratch& s = scratch_[member.rank()];
  const auto compute = [&](int64_t at, int64_t count, bool penalise) {
    kernels_.dot_listed(w, &contenders_[at], count, x.both(), 0, &contending_[at]);
    s.count_read(count * w.row_bytes);
    for (int64_t i = at; i < at + count; ++i) {
      contending_[i] = capped(contending_[i]);
      if (penalise) contending_[i] = penalised(contending_[i], draw.params.repetition_penalty);
    }
  };
  share(member, n, std::max<int64_t>(kLeastBytes / w.row_bytes, 1), [&](int64_t first, int64_t last) {
    int64_t before = 0;  // of the lists that were passed
    const auto part = [&](int64_t at, int64_t size, bool penalise) {
      const int64_t from = std::max(first, before), to = std::min(last, before + size);
      if (from < to) compute(at + from - before, to - from, penalise);
      before += size;
    };
    for (int rank = 0; rank < member.size(); ++rank) {
      const auto [at, size] = scratch_[rank].contenders;
      part(at, size, false);
    }
    part(config_.vocab, static_cast<int64_t>(draw.penalised.size()), true);
  });
}

int32_t Forward::first_of_contenders(const Draw& draw) {
  int64_t n = 0;
  const auto add = [&](int64_t at, int64_t size) {
    std::copy_n(contenders_.begin() + at, size, contenders_.begin() + n);
    std::copy_n(contending_.begin() + at, size, contending_.begin() + n);
    n += size;
  };
  for (const Scratch& s : scratch_) add(s.contenders.first, s.contenders.second);
  add(config_.vocab, static_cast<int64_t>(draw.penalised.size()));
  return sample_listed(contenders_.data(), contending_.data(), n, draw.params, draw.position);
}

}  // namespace turbosparse
