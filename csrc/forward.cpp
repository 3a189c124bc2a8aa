// SPDX-License-Identifier: Apache-2.0
#include "forward.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace turbosparse {

Forward::Forward(std::shared_ptr<Model> model)
    : model_(std::move(model)),
      config_(model_->config()),
      kernels_(model_->kernels()),
      most_slots_(kMostRows * config_.ffns_used()) {
  const int64_t n = kMostRows, per_block = model_->neuron_block();
  const int64_t widest = std::max({config_.hidden, config_.q_size(), config_.ffn});
  residual_.resize(n * config_.hidden);
  update_.resize(most_slots_ * config_.hidden);
  qkv_.resize(n * (config_.q_size() + 2 * config_.kv_size()));
  attended_.resize(n * config_.q_size());
  const int64_t shared =
      (config_.neurons_per_gate > 1 ? config_.gate_rows() : 0) + (config_.mirrored_ups ? config_.up_rows() : 0);
  hidden_ = Mapping(most_slots_ * (3 * config_.ffn + shared) * sizeof(float), false);
  if (config_.sparse()) {
    partial_ = Mapping(most_slots_ * model_->neuron_blocks() * config_.hidden * sizeof(float), false);
  }
  const int64_t rank = config_.widest_predictor();
  predictor_hidden_.resize(most_slots_ * rank);
  router_.resize(n * config_.experts);
  for (auto* table : {&cosine_, &sine_, &cosine_local_, &sine_local_}) table->resize(n * (config_.head_dim / 2));
  const int64_t width[kRooms] = {widest, rank > 0 ? std::max(rank, config_.hidden) : 0};
  const auto resize = [&](InputRoom* rooms, int64_t vectors) {
    for (int room = 0; room < kRooms; ++room) {
      rooms[room].values.resize(vectors, width[room]);
      rooms[room].rest.resize(vectors, width[room]);
    }
  };
  resize(shared_, most_slots_);
  scratch_.resize(model_->team().size());
  for (Scratch& s : scratch_) {
    resize(s.inputs, 1);
    s.queries.resize(config_.heads / config_.kv_heads, config_.head_dim);
    s.inverse.resize(config_.heads / config_.kv_heads);
    for (auto* of_row : {&s.gate_open, &s.value}) of_row->resize(per_block);
    s.open.resize(per_block);
    s.listed.resize(per_block);
    s.seen.resize(3 * per_block);
  }
}

void Forward::check(const Session& session, int64_t n, Mode mode) const {
  if (session.model_ != model_) throw std::invalid_argument("a session of another model");
  if (n > session.context_ - session.position_) throw std::invalid_argument("the context is full");
  if (mode != Mode::dense && !config_.sparse()) throw std::invalid_argument("this mode needs a ReLU-gated model");
  const bool predicts = mode == Mode::predicted || mode == Mode::automatic_predicted;
  if (predicts && !config_.predicts()) throw std::invalid_argument("there is no predictor");
}

void Forward::check(int32_t token) const {
  if (token < 0 || token >= config_.vocab) throw std::invalid_argument("token id outside of the vocabulary");
}

void Forward::read(Session& session, const int32_t* tokens, int64_t n, Mode mode, bool all_logits, float* logits) {
  if (n < 1) throw std::invalid_argument("no tokens");
  for (int64_t i = 0; i < n; ++i) check(tokens[i]);
  const std::lock_guard<std::mutex> lock(model_->busy());
  check(session, n, mode);
  for (int64_t done = 0; done < n; done += kMostRows) {
    const int64_t size = std::min(kMostRows, n - done);
    Row rows[kMostRows];
    for (int64_t t = 0; t < size; ++t) rows[t] = {&session, session.position_ + t, tokens[done + t]};
    const int64_t n_logits = all_logits ? size : (done + size == n ? 1 : 0);
    run(Pass{rows, size, mode, n_logits, logits + (all_logits ? done * config_.vocab : 0), false});
    session.advance(tokens + done, size);
  }
}

void Forward::decode(Session* const* sessions, const int32_t* tokens, int64_t n, Mode mode, float* logits) {
  if (n < 1) throw std::invalid_argument("no tokens");
  for (int64_t i = 0; i < n; ++i) {
    check(tokens[i]);
    if (std::find(sessions, sessions + i, sessions[i]) != sessions + i) {
      throw std::invalid_argument("a session is given twice");
    }
  }
  const std::lock_guard<std::mutex> lock(model_->busy());
  for (int64_t i = 0; i < n; ++i) check(*sessions[i], 1, mode);
  for (int64_t done = 0; done < n; done += kMostRows) {
    const int64_t size = std::min(kMostRows, n - done);
    Row rows[kMostRows];
    for (int64_t t = 0; t < size; ++t) {
      rows[t] = {sessions[done + t], sessions[done + t]->position_, tokens[done + t]};
    }
    step(rows, size, mode, logits + done * config_.vocab, nullptr);
  }
}

// Run a token of each of several sessions. logits: [n, vocab]; with `draw` the logits of the only row are needed for
// nothing else.
void Forward::step(const Row* rows, int64_t n, Mode mode, float* logits, Draw* draw) {
  for (int64_t t = 0; t < n && automatic(mode); ++t) {
    rows[t].session->choice_.begin_token(mode == Mode::automatic_predicted);
  }
  const std::vector<int64_t> audited = audit(rows, n, mode);
  Pass pass{rows, n, mode, n, logits, true};
  if (audited.empty()) pass.draw = draw;
  run(pass);
  for (size_t i = 0; i < audited.size(); ++i) {
    const Row& row = rows[audited[i]];
    row.session->audit_.close(row.position, &audited_[i * config_.vocab], logits + audited[i] * config_.vocab,
                              config_.vocab);
  }
  for (int64_t t = 0; t < n; ++t) {
    rows[t].session->advance(&rows[t].token, 1);
    if (automatic(mode)) rows[t].session->choice_.finish_token();
  }
}

void Forward::extend(Session& session, const int32_t* tokens, int64_t n, Mode mode, bool draft, float* logits) {
  if (n < 1 || n > kMostRows) throw std::invalid_argument("one to kMostRows tokens");
  for (int64_t i = 0; i < n; ++i) check(tokens[i]);
  const std::lock_guard<std::mutex> lock(model_->busy());
  check(session, n, mode);
  Row rows[kMostRows];
  for (int64_t t = 0; t < n; ++t) rows[t] = {&session, session.position_ + t, tokens[t]};
  run(Pass{rows, n, mode, n, logits, true, draft});
  session.advance(tokens, n);
}

// Run the rows that are to be audited exactly, for their audits and into audited_; returns which they are. Their keys
// and values are those of these passes until the pass that follows has written its own.
std::vector<int64_t> Forward::audit(const Row* rows, int64_t n, Mode mode) {
  std::vector<int64_t> audited;
  if (mode != Mode::predicted && mode != Mode::automatic_predicted) return audited;
  for (int64_t t = 0; t < n; ++t) {
    Audit& audit = rows[t].session->audit_;
    const Pass predicting{rows, n, mode, 0, nullptr, true};
    bool predicted = false;
    for (int64_t layer = 0; layer < config_.layers; ++layer) {
      predicted = predicted || mode_of(predicting, t, layer) == Mode::predicted;
    }
    if (!predicted || !audit.due(rows[t].position)) continue;
    audited.push_back(t);
    audited_.resize(std::max(audited_.size(), audited.size() * config_.vocab));
    audit.open();
    run(Pass{&rows[t], 1, Mode::exact, 1, &audited_[(audited.size() - 1) * config_.vocab], true, true, mode, &audit});
  }
  return audited;
}

void Forward::run(const Pass& pass) {
  counts_ = pass.audit ? nullptr : model_->counts();
  int64_t cells = 0, longest = 0;
  for (int64_t t = 0; t < pass.n; ++t) {
    const Session& session = *pass.rows[t].session;
    longest = std::max(longest, pass.rows[t].position + 1);
    cells = std::max(cells, session.context_);
  }
  if (static_cast<int64_t>(cells_.size()) < cells) {
    cells_.resize(cells);
    std::iota(cells_.begin(), cells_.end(), 0);
  }
  for (Scratch& s : scratch_) {
    s.traffic = Traffic{};
    s.work = works_;
    const auto scores = static_cast<size_t>(config_.heads / config_.kv_heads * longest);
    if (s.scores.size() < scores) s.scores.resize(2 * scores);
  }
  const int members = model_->pace().size();
  const bool timed = pass.decode && model_->times_phases();
  const auto job = [&](Member& member) {
    PhaseClock& clock = scratch_[member.rank()].clock;
    clock.start(timed);
    if (timed) member.time_with(&clock);
    layers(member, pass);
    if (timed) member.barrier();
    clock.enter(Phase::other);
  };
  model_->team().run(job, members);
  works_ = scratch_[0].work;
  model_->pace().report(model_->team().stalled());
  for (int rank = 0; timed && rank < members; ++rank) model_->phases().add(scratch_[rank].clock.times(), members);
  if (counts_) counts_->tokens += pass.n;
  if (!pass.decode) return;
  Traffic cost{pass.n, pass.n * model_->embedding().row_bytes};
  for (const Scratch& s : scratch_) cost += s.traffic;
  model_->traffic() += pass.draft ? Traffic{0, cost.bytes} : cost;
}

void Forward::layers(Member& member, const Pass& pass) {
  embed(member, pass);
  for (int64_t index = 0; index < config_.layers; ++index) {
    attention(member, pass, index);
    if (config_.sparse()) {
      sparse_ffn(member, pass, index);
    } else {
      dense_ffn(member, pass, index);
    }
  }
  if (pass.draw) {
    draw_head(member, pass);
  } else if (pass.n_logits > 0) {
    head(member, pass);
  }
}

void Forward::embed(Member& member, const Pass& pass) {
  const int64_t half = config_.head_dim / 2;
  const auto [first, last] = member.part(pass.n);
  for (int64_t t = first; t < last; ++t) {
    float* x = &residual_[t * config_.hidden];
    kernels_.decode_row(model_->embedding(), pass.rows[t].token, x);
    if (config_.embedding_scale != 1.0f) {
      for (int64_t c = 0; c < config_.hidden; ++c) x[c] *= config_.embedding_scale;
    }
    for (const bool sliding : {false, true}) {
      const auto& frequencies = model_->frequencies(sliding);
      float* cosine = &(sliding ? cosine_local_ : cosine_)[t * half];
      float* sine = &(sliding ? sine_local_ : sine_)[t * half];
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(pass.rows[t].position) * frequencies[i];
        cosine[i] = static_cast<float>(std::cos(angle));
        sine[i] = static_cast<float>(std::sin(angle));
      }
    }
  }
  member.barrier();
}

void Forward::head(Member& member, const Pass& pass) {
  const int64_t skipped = pass.n - pass.n_logits;
  const Inputs x = prepare(member, pass.n_logits, model_->head(), residual_.data() + skipped * config_.hidden,
                           config_.hidden, model_->output_norm());
  enter(member, Phase::head);
  all_logits(member, x, pass.logits);
}

void Forward::all_logits(Member& member, const Inputs& x, float* logits) {
  const int64_t vocab = config_.vocab;
  multiply(member, model_->head(), x, logits, vocab, [&](int64_t first, int64_t last) {
    for (int64_t t = 0; config_.logit_softcap > 0 && t < x.values.count; ++t) {
      for (int64_t r = first; r < last; ++r) logits[t * vocab + r] = capped(logits[t * vocab + r]);
    }
  });
}

}  // namespace turbosparse
