// SPDX-License-Identifier: Apache-2.0
// The forward pass of a model over rows: tokens of one prompt, or one token of each of several sequences.
//
// Every member of the team runs all of it; a barrier stands wherever one needs what another computed. A row gets the
// bits that it would get alone: every product of a row of weights with a vector, every softmax and every sum over
// neurons has an order of its own that does not depend on what is computed beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "memory.h"
#include "model.h"
#include "phases.h"
#include "pieces.h"
#include "routing.h"
#include "sampler.h"
#include "session.h"
#include "sketch.h"

namespace turbosparse {

class Forward {
 public:
  explicit Forward(std::shared_ptr<Model> model);

  // Run `n` tokens of a sequence from its position on. logits: [n, vocab] if all_logits, else [vocab] after the last
  // token. Throws std::invalid_argument on a bad token id or when the context is full.
  void read(Session& session, const int32_t* tokens, int64_t n, Mode mode, bool all_logits, float* logits);

  // Run one token of each of `n` different sequences, and count what that costs. logits: [n, vocab]. Throws as read().
  void decode(Session* const* sessions, const int32_t* tokens, int64_t n, Mode mode, float* logits);

  // Run `n` tokens of a sequence that is being continued, at most kMostRows, each as decode() would: what several of
  // them need is read once. Of a `draft`, whose tokens will be run again, only the bytes are counted. logits: [n,
  // vocab]. Throws as read().
  void extend(Session& session, const int32_t* tokens, int64_t n, Mode mode, bool draft, float* logits);

  // Run one token as decode() and draw the next one: what sample() draws from decode()'s logits, bit for bit, but most
  // of these are only known to be too small. Throws as read().
  int32_t draw(Session& session, int32_t token, Mode mode, const SamplingParams& params);

  int64_t vocab() const { return config_.vocab; }

 private:
  // Room for a set of inputs of matrix products, in fp32 and as int8 blocks.
  struct Prepared {
    std::vector<float> x, scale;
    std::vector<int8_t> q;
    std::vector<int32_t> sum;
    void resize(int64_t n, int64_t cols);
    Vectors view(int64_t n, int64_t cols, bool quantized) const;
  };
  // The inputs of a product. Blocks of int8 lose more than Q8_0 weights do, so for these a second int8 vector holds
  // what the first one left: x = values + rest, to some 15 bits. `rest.count` is 0 where it is not needed.
  struct Inputs {
    Vectors values, rest;
    Vectors both() const {
      Vectors v = values;
      if (rest.count > 0) v.rest = &rest;
      return v;
    }
    // Those of a group of slots. A single vector is that of the only row, whatever FFN computes it.
    Inputs of(const Routing::Group& group) const;
  };
  struct InputRoom {
    Prepared values, rest;
  };
  // Inputs that are needed at the same time lie in different rooms.
  enum Room { kMain, kPredictor, kRooms };
  struct Row {
    Session* session;
    int64_t position;
    int32_t token;
  };
  // What a member needs for itself, in cache lines of its own.
  struct alignas(64) Scratch {
    InputRoom inputs[kRooms];
    Prepared queries;
    std::vector<float> scores, inverse;
    std::vector<float> gate_open, value;  // of listed neurons
    std::vector<int32_t> open, listed;
    std::vector<uint8_t> seen;  // [gate, up and down, rows of a block]: read for an earlier row already
    Routing routing;            // of the layer at work; the same in every member
    std::vector<Row> slots;     // the rows in the order of its slots
    Traffic traffic;
    PhaseClock clock;
    uint32_t work = 0;    // number of the one at hand
    int32_t leader = -1;  // the row that it would draw of its own, by the sketch; -1: none
    // Where those of its rows that may be drawn begin in contenders_, and how many they are.
    std::pair<int64_t, int64_t> contenders;

    void count_read(int64_t bytes) {
      traffic.bytes += bytes;
      clock.read(bytes);
    }
  };
  // A token to draw from the sketch of the head.
  struct Draw {
    const Sketch& sketch;
    const SamplingParams& params;
    uint64_t position;
    std::vector<int32_t> penalised;  // ascending
    bool whole = true;               // every logit was computed after all
    bool flat = false;               // because too many might be drawn
  };
  // What the logit of a row has to reach.
  struct Line {
    float length;      // of the vector that it is multiplied with
    float divisor;     // the temperature, or 1
    float least;       // of the logit over it
    const Race* race;  // which the leaders have entered; null where the least decides
  };
  // The arguments of one pass, shared by the members.
  struct Pass {
    const Row* rows;
    int64_t n;
    Mode mode;
    int64_t n_logits;  // after the last rows
    float* logits;
    bool decode;                 // rows of sequences that are being continued, not of a prompt
    bool draft = false;          // its tokens will be run again
    Mode audited = Mode::exact;  // how the only row will be run again
    Audit* audit = nullptr;      // that this pass is for
    Draw* draw = nullptr;        // instead of the logits of the only row
  };
  // What of an FFN is computed for all neurons and rows of a group; the rest, each row for those neurons that need it.
  struct Whole {
    bool scores, gates, ups;
  };
  // A block of a sparse FFN at work: neurons [first, first + n) of an FFN of layer `index`, for the rows from `slot`
  // on.
  struct Neurons {
    const Ffn& ffn;
    int64_t index, expert, slot, block, first, n;
    Whole whole;
  };

  void check(const Session& session, int64_t n, Mode mode) const;
  void check(int32_t token) const;
  Mode mode_of(const Pass& pass, int64_t row, int64_t layer) const;
  bool audits(const Pass& pass, int64_t layer) const;
  bool scores_wanted(const Pass& pass, int64_t index) const;
  bool opens(float gate) const { return gate > 0 && gate >= config_.gate_threshold; }
  void run(const Pass& pass);
  void step(const Row* rows, int64_t n, Mode mode, float* logits, Draw* draw);
  std::vector<int64_t> audit(const Row* rows, int64_t n, Mode mode);
  void enter(const Member& member, Phase phase) { scratch_[member.rank()].clock.enter(phase); }
  void layers(Member& member, const Pass& pass);
  void embed(Member& member, const Pass& pass);
  void head(Member& member, const Pass& pass);
  void all_logits(Member& member, const Inputs& x, float* logits);
  float capped(float logit) const {
    const float cap = config_.logit_softcap;
    return cap > 0 ? cap * std::tanh(logit / cap) : logit;
  }

  // draw.cpp
  void draw_head(Member& member, const Pass& pass);
  bool bounded(const Draw& draw, float length) const;
  Inputs sketch_inputs(Member& member, const Inputs& x);
  void find_leaders(Member& member, const Draw& draw, const Inputs& x);
  Line line_of(Member& member, const Draw& draw, const Inputs& x, float length, Race& race);
  void find_contenders(Member& member, const Draw& draw, const Line& line);
  void over_line(const Draw& draw, const Line& line, int64_t first, int64_t n, float* over) const;
  void compute_contenders(Member& member, const Draw& draw, const Inputs& x, int64_t n);
  int32_t first_of_contenders(const Draw& draw);

  // products.cpp: make vectors (the residual stream, for `normed`) the inputs of products with `w` and matrices of its
  // type; every member gets all n of them.
  Inputs normed(Member& member, int64_t n, const float* weight, const Matrix& w);
  // With `rows`, vector i is row rows[i] of the source.
  Inputs prepare(Member& member, int64_t n, const Matrix& w, const float* source, int64_t stride, const float* norm,
                 Room room = kMain, const int32_t* rows = nullptr);
  void quantize_rest(InputRoom& room, int64_t t, int64_t cols);
  void multiply(Member& member, const Matrix& w, const Inputs& x, float* out, int64_t stride) {
    multiply(member, w, x, out, stride, [](int64_t, int64_t) {});
  }
  // And then(first, last) for every piece of rows, by the member that multiplied it.
  template <class Then>
  void multiply(Member& member, const Matrix& w, const Inputs& x, float* out, int64_t stride, Then then) {
    share_rows(member, w, x, [&](int64_t first, int64_t last) {
      product(scratch_[member.rank()], w, first, last, x, out, stride);
      then(first, last);
    });
  }
  // Calls work(first, last) for pieces of the rows of w until the members have done all of them.
  template <class Work>
  void share_rows(Member& member, const Matrix& w, const Inputs& x, Work work) {
    constexpr int64_t kAlign = 16, kLeastBytes = 16 << 10;
    if (x.values.count > 1) {  // bound by the core, and inputs are made ready for each piece
      const auto [first, last] = member.part(w.rows, kAlign);
      if (first < last) work(first, last);
      return;
    }
    const int64_t least = (kLeastBytes / w.row_bytes + kAlign) / kAlign * kAlign;
    share(member, w.rows, least, work);
  }
  // The same for [0, total), in pieces of at least `least`.
  template <class Work>
  void share(Member& member, int64_t total, int64_t least, Work work) {
    const uint32_t number = ++scratch_[member.rank()].work;
    while (true) {
      const auto [first, last] = pieces_.next(number, total, least, member.size());
      if (first >= last) return;
      work(first, last);
    }
  }
  // Rows [first, last) of w; row r of vector v goes to out[v * stride + r].
  void product(Scratch& scratch, const Matrix& w, int64_t first, int64_t last, const Inputs& x, float* out,
               int64_t stride);
  // The n rows of w in scratch.listed by one vector, into scratch.value.
  void listed_product(Scratch& scratch, const Matrix& w, int64_t n, const Inputs& x, int64_t vector);
  void add_to_residual(Member& member, const Pass& pass, const Matrix& w, const Inputs& x, const float* post_norm);
  void norm_into_residual(Member& member, int64_t n, const float* post_norm);

  // attention.cpp
  void attention(Member& member, const Pass& pass, int64_t index);
  void rotate(float* head, const float* cosine, const float* sine) const;
  void store_keys_and_values(Member& member, const Pass& pass, int64_t index);
  void attend(Scratch& scratch, const Pass& pass, int64_t index, int64_t row, int64_t head, int64_t heads);
  Vectors queries_of(Scratch& scratch, const KvCache& cache, const float* x, int64_t heads);

  // feed_forward.cpp
  void dense_ffn(Member& member, const Pass& pass, int64_t index);
  void sparse_ffn(Member& member, const Pass& pass, int64_t index);
  Inputs route(Member& member, const Pass& pass, int64_t index);
  void combine(const Routing::Group& group, int64_t index, int64_t first, int64_t last, float* gate, const float* up);
  void add_outputs(Member& member, const Routing& routing, const float* post_norm);
  Inputs predictor_hidden(Member& member, const Pass& pass, const Layer& layer, const Inputs& x);
  Whole whole_of(const Pass& pass, int64_t index, bool predicts) const;
  void whole_products(Member& member, const Ffn& ffn, const Whole& whole, const Routing::Group& group, const Inputs& x,
                      const Inputs& hidden);
  template <class Spread>
  void whole_rows(Member& member, const Matrix& w, int64_t times, const Routing::Group& group, const Inputs& x,
                  float* once, float* all, Spread spread);
  void neuron_block(Scratch& s, const Pass& pass, int64_t index, const Routing::Group& group, int64_t block,
                    const Inputs& x, const Whole& whole);
  static bool sums_together(const Pass& pass, const Matrix& down);
  void fire(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x);
  void count_row(const Pass& pass, const Neurons& at, int64_t row);
  void reduce_blocks(Member& member, int64_t slots);

  // open_neurons.cpp
  int64_t open_gates(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x, int64_t selected);
  void listed_gates(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x, int64_t n);
  void listed_ups(Scratch& s, const Pass& pass, const Neurons& at, int64_t row, const Inputs& x, int64_t n);
  int64_t keep_open(Scratch& s, int64_t n) const;
  int64_t select(Scratch& s, const Pass& pass, const Neurons& at, int64_t row);
  int64_t list_rows(Scratch& s, const Neurons& at, int64_t n, int64_t per_row);
  void spread_rows(Scratch& s, const Neurons& at, int64_t n, int64_t per_row, int64_t rows);
  int64_t list_every(Scratch& s, const Neurons& at, int64_t active);
  void count_read(Scratch& s, const Pass& pass, int64_t first, int64_t n, const Matrix& w, int which);

  // Of all FFNs' rows, [slots, ffn].
  float* gates() { return reinterpret_cast<float*>(hidden_.data()); }
  float* ups() { return gates() + most_slots_ * config_.ffn; }
  float* scores() { return ups() + most_slots_ * config_.ffn; }
  // [slots, gate rows] and [slots, up rows]: each gate and each up once, where several neurons share it.
  float* shared_gates() { return scores() + most_slots_ * config_.ffn; }
  float* shared_ups() { return shared_gates() + most_slots_ * config_.gate_rows(); }
  float* row_of(float* rows, const Neurons& at, int64_t row) const {
    return rows + (at.slot + row) * config_.ffn + at.first;
  }
  float* partial_of(int64_t slot, int64_t block) {
    return reinterpret_cast<float*>(partial_.data()) + (slot * model_->neuron_blocks() + block) * config_.hidden;
  }

  std::shared_ptr<Model> model_;
  const Config& config_;
  const Kernels& kernels_;
  std::vector<int32_t> cells_;  // 0, 1, 2 ... as many as the longest context that was seen
  const int64_t most_slots_;    // of a layer: rows, each as often as it is computed
  std::vector<float> residual_, update_, qkv_, attended_, predictor_hidden_, router_;
  Mapping hidden_;   // gates, ups and scores: [3, slots, ffn] floats; and gates and ups that neurons share once more
  Mapping partial_;  // [slots, neuron blocks, hidden] floats
  std::vector<float> cosine_, sine_, cosine_local_, sine_local_;
  InputRoom shared_[kRooms];
  std::vector<Scratch> scratch_;
  std::vector<float> audited_;  // [audited rows, vocab]: the exact logits
  // Of the token that is drawn, [vocab]: logits of the sketch, or all there are; how early tokens come in the race; and
  // in both of [vocab + penalised], with room for each part of the rows where these begin, those that may be drawn.
  std::vector<float> drawn_from_, early_;
  std::vector<int32_t> contenders_;
  std::vector<float> contending_;  // their logits
  Counts* counts_ = nullptr;       // the model's, while it counts
  Pieces pieces_;
  uint32_t works_ = 0;  // that were handed out so far
};

}  // namespace turbosparse
