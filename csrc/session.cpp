// SPDX-License-Identifier: Apache-2.0
// The forward pass. Every member of the team runs all of it; a barrier stands wherever one needs what another computed.
//
// A prompt is processed in blocks and gets the bits that it would get token by token: every product of a row with a
// vector, every softmax and every sum over neurons has an order of its own that does not depend on what is computed
// beside it.
#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "kernels/pack.h"

namespace turbosparse {
namespace {

// left = x - scale * q: what quantisation lost.
void take_quantised_off(const float* x, const int8_t* q, const float* scale, int64_t blocks, float* left) {
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    for (int64_t b = 0; b < group; ++b) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t column = (begin + b) * kBlock + i;
        left[column] = x[column] - scale[begin + b] * q[begin * kBlock + byte_in_group(group, b, i)];
      }
    }
    begin += group;
  }
}

}  // namespace

struct Session::Pass {
  const int32_t* tokens;
  int64_t n;
  Mode mode;
  int64_t n_logits;
  float* logits;
  bool decode;  // one token by itself, not a part of a prompt
};

void Session::Prepared::resize(int64_t n, int64_t cols) {
  x.resize(n * cols);
  q.resize(n * cols);
  scale.resize(n * (cols / kBlock));
  sum.resize(n * (cols / kBlock));
}

Vectors Session::Prepared::view(int64_t n, int64_t cols, bool quantized) const {
  Vectors v;
  v.count = n;
  v.cols = cols;
  v.x = x.data();
  if (quantized) {
    v.q = q.data();
    v.scale = scale.data();
    v.sum = sum.data();
  }
  return v;
}

Session::Session(std::shared_ptr<Model> model, int64_t context)
    : model_(std::move(model)), config_(model_->config()), kernels_(model_->kernels()), context_(context) {
  if (context < 1) throw std::invalid_argument("the context must hold at least one token");
  element_bytes_ = model_->exact_fp32() ? 4 : 2;
  const size_t cache = static_cast<size_t>(config_.layers) * config_.kv_size() * context_ * element_bytes_;
  keys_ = Mapping(cache, false);
  values_ = Mapping(cache, false);
  const int64_t n = kPrefillBlock;
  const int64_t widest = std::max({config_.hidden, config_.q_size(), config_.ffn});
  residual_.resize(n * config_.hidden);
  update_.resize(n * config_.hidden);
  qkv_.resize(n * (config_.q_size() + 2 * config_.kv_size()));
  attended_.resize(n * config_.q_size());
  if (config_.sparse()) {
    partial_.resize(model_->neuron_blocks() * n * config_.hidden);
  } else {
    hidden_.resize(2 * n * config_.ffn);
  }
  for (auto* table : {&cosine_, &sine_, &cosine_local_, &sine_local_}) table->resize(n * (config_.head_dim / 2));
  shared_.resize(n, widest);
  shared_rest_.resize(n, widest);
  positions_.resize(context_);
  std::iota(positions_.begin(), positions_.end(), 0);
  scratch_.resize(model_->team().size());
  for (Scratch& s : scratch_) {
    s.input.resize(1, widest);
    s.rest.resize(1, widest);
    s.scores.resize(config_.heads / config_.kv_heads * context_);
    s.gate.resize(n * model_->neuron_block());
    s.up.resize(n * model_->neuron_block());
    s.coefficient.resize(model_->neuron_block());
    s.open.resize(model_->neuron_block());
    s.active.resize(model_->neuron_block());
  }
}

void Session::forward(const int32_t* tokens, int64_t n, Mode mode, bool all_logits, bool decode, float* logits) {
  if (n < 1) throw std::invalid_argument("no tokens");
  if (decode && n != 1) throw std::invalid_argument("decoding takes one token");
  if (n > context_ - position_) throw std::invalid_argument("the context is full");
  if (mode == Mode::exact && !config_.sparse()) throw std::invalid_argument("exact mode needs a ReLU-gated model");
  for (int64_t i = 0; i < n; ++i) {
    if (tokens[i] < 0 || tokens[i] >= config_.vocab) throw std::invalid_argument("token id outside of the vocabulary");
  }
  const std::lock_guard<std::mutex> lock(model_->busy());
  counts_ = model_->counts();
  for (int64_t done = 0; done < n; done += kPrefillBlock) {
    const int64_t size = std::min(kPrefillBlock, n - done);
    const bool last = done + size == n;
    const int64_t n_logits = all_logits ? size : (last ? 1 : 0);
    block(Pass{tokens + done, size, mode, n_logits, logits + (all_logits ? done * config_.vocab : 0), decode});
  }
}

void Session::truncate(int64_t position) {
  if (position < 0 || position > position_) throw std::invalid_argument("the cache does not reach that far");
  position_ = position;
}

void Session::block(const Pass& pass) {
  for (Scratch& s : scratch_) s.traffic = Traffic{};
  model_->team().run([&](Member& member) { run(member, pass); }, model_->pace().size());
  model_->pace().report(model_->team().stalled());
  position_ += pass.n;
  if (counts_) counts_->tokens += pass.n;
  if (!pass.decode) return;
  Traffic& traffic = model_->traffic();
  traffic.tokens += 1;
  traffic.bytes += model_->embedding().row_bytes;
  for (const Scratch& s : scratch_) {
    traffic.bytes += s.traffic.bytes;
    traffic.active_neurons += s.traffic.active_neurons;
    traffic.open_gates += s.traffic.open_gates;
  }
}

void Session::run(Member& member, const Pass& pass) {
  embed(member, pass);
  for (int64_t index = 0; index < config_.layers; ++index) {
    attention(member, pass, index);
    if (config_.sparse()) {
      sparse_ffn(member, pass, index);
    } else {
      dense_ffn(member, pass, index);
    }
  }
  if (pass.n_logits > 0) head(member, pass);
}

void Session::embed(Member& member, const Pass& pass) {
  const int64_t half = config_.head_dim / 2;
  const auto [first, last] = member.part(pass.n);
  for (int64_t t = first; t < last; ++t) {
    float* x = &residual_[t * config_.hidden];
    kernels_.decode_row(model_->embedding(), pass.tokens[t], x);
    if (config_.embedding_scale != 1.0f) {
      for (int64_t c = 0; c < config_.hidden; ++c) x[c] *= config_.embedding_scale;
    }
    for (const bool sliding : {false, true}) {
      const auto& frequencies = model_->frequencies(sliding);
      float* cosine = &(sliding ? cosine_local_ : cosine_)[t * half];
      float* sine = &(sliding ? sine_local_ : sine_)[t * half];
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position_ + t) * frequencies[i];
        cosine[i] = static_cast<float>(std::cos(angle));
        sine[i] = static_cast<float>(std::sin(angle));
      }
    }
  }
  member.barrier();
}

Session::Inputs Session::prepare(Member& member, int64_t n, const Matrix& w, const float* source, int64_t stride,
                                 const float* norm) {
  // A single vector is prepared by every member for itself: cheaper than a barrier.
  const bool alone = n == 1;
  const int64_t cols = w.cols, blocks = cols / kBlock;
  Prepared& into = alone ? scratch_[member.rank()].input : shared_;
  Prepared& rest = alone ? scratch_[member.rank()].rest : shared_rest_;
  const bool quantized = !model_->exact_fp32() && cols % kBlock == 0;
  const bool fine = quantized && model_->fine_inputs();
  const auto [first, last] = alone ? std::pair<int64_t, int64_t>{0, 1} : member.part(n);
  for (int64_t t = first; t < last; ++t) {
    float* x = &into.x[t * cols];
    if (norm) {
      kernels_.rms_norm(source + t * stride, norm, cols, config_.norm_eps, x);
    } else {
      std::memcpy(x, source + t * stride, cols * sizeof(float));
    }
    if (!quantized) continue;
    const int8_t* q = &into.q[t * cols];
    const float* scale = &into.scale[t * blocks];
    kernels_.quantize(x, cols, &into.q[t * cols], &into.scale[t * blocks], &into.sum[t * blocks]);
    if (!fine) continue;
    float* left = &rest.x[t * cols];
    take_quantised_off(x, q, scale, blocks, left);
    kernels_.quantize(left, cols, &rest.q[t * cols], &rest.scale[t * blocks], &rest.sum[t * blocks]);
  }
  if (!alone) member.barrier();
  return Inputs{into.view(n, cols, quantized), rest.view(fine ? n : 0, cols, fine)};
}

Session::Inputs Session::normed(Member& member, int64_t n, const float* weight, const Matrix& w) {
  return prepare(member, n, w, residual_.data(), config_.hidden, weight);
}

void Session::product(Scratch& scratch, const Matrix& w, int64_t first, int64_t last, const Inputs& x, float* out,
                      int64_t stride) {
  scratch.traffic.bytes += (last - first) * w.row_bytes;
  kernels_.dot(w, first, last, x.both(), out, stride);
}

// The rows in scratch.active of w by one vector, into scratch.coefficient.
void Session::listed_product(Scratch& scratch, const Matrix& w, int64_t n, const Inputs& x, int64_t vector) {
  scratch.traffic.bytes += n * w.row_bytes;
  kernels_.dot_listed(w, scratch.active.data(), n, x.both(), vector, scratch.coefficient.data());
}

void Session::multiply(Member& member, const Matrix& w, const Inputs& x, float* out, int64_t stride) {
  const auto [first, last] = member.part(w.rows, 16);
  if (first < last) product(scratch_[member.rank()], w, first, last, x, out, stride);
}

void Session::add_to_residual(Member& member, const Pass& pass, const Matrix& w, const Inputs& x,
                              const float* post_norm) {
  const int64_t d = config_.hidden;
  multiply(member, w, x, update_.data(), d);
  if (post_norm) {
    norm_into_residual(member, pass.n, post_norm);
    return;
  }
  const auto [first, last] = member.part(w.rows, 16);
  for (int64_t t = 0; t < pass.n; ++t) {
    for (int64_t c = first; c < last; ++c) residual_[t * d + c] += update_[t * d + c];
  }
  member.barrier();
}

void Session::norm_into_residual(Member& member, int64_t n, const float* post_norm) {
  const int64_t d = config_.hidden;
  member.barrier();
  const auto [first, last] = member.part(n);
  for (int64_t t = first; t < last; ++t) {
    float* update = &update_[t * d];
    kernels_.rms_norm(update, post_norm, d, config_.norm_eps, update);
    for (int64_t c = 0; c < d; ++c) residual_[t * d + c] += update[c];
  }
  member.barrier();
}

// ---- attention ------------------------------------------------------------------------------------------------------

// The keys or values of one head as a matrix: a row a position.
Matrix Session::cached(const Mapping& cache, int64_t layer, int64_t kv_head) const {
  Matrix m;
  m.type = element_bytes_ == 4 ? WeightType::f32 : WeightType::f16;
  m.rows = context_;
  m.cols = config_.head_dim;
  m.row_bytes = config_.head_dim * element_bytes_;
  m.values = cache.data() + (layer * config_.kv_heads + kv_head) * context_ * m.row_bytes;
  return m;
}

std::byte* Session::cell(const Mapping& cache, int64_t layer, int64_t kv_head, int64_t position) const {
  const int64_t row = (layer * config_.kv_heads + kv_head) * context_ + position;
  return cache.data() + row * config_.head_dim * element_bytes_;
}

void Session::attention(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  const int64_t q = config_.q_size(), kv = config_.kv_size(), stride = q + 2 * kv;
  const Inputs x = normed(member, pass.n, layer.attention_norm, layer.q);
  multiply(member, layer.q, x, qkv_.data(), stride);
  multiply(member, layer.k, x, qkv_.data() + q, stride);
  multiply(member, layer.v, x, qkv_.data() + q + kv, stride);
  member.barrier();
  store_keys_and_values(member, pass, index);
  member.barrier();
  // Heads that share keys are scored together in a prompt, so that a key is read once; one token is split by head.
  const int64_t together = pass.n > 1 ? config_.heads / config_.kv_heads : 1;
  const int64_t items = config_.heads / together;
  const auto [first, last] = member.part(pass.n * items);
  for (int64_t item = first; item < last; ++item) {
    attend(member, index, item / items, item % items * together, together);
  }
  member.barrier();
  const Inputs attended = prepare(member, pass.n, layer.o, attended_.data(), q, nullptr);
  add_to_residual(member, pass, layer.o, attended, layer.post_attention_norm);
}

void Session::rotate(float* head, const float* cosine, const float* sine) const {
  const int64_t half = config_.head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    float& a = config_.rope_interleaved ? head[2 * i] : head[i];
    float& b = config_.rope_interleaved ? head[2 * i + 1] : head[i + half];
    const float x = a, y = b;
    a = x * cosine[i] - y * sine[i];
    b = y * cosine[i] + x * sine[i];
  }
}

// Bias, norm and rotation of the new queries and keys; keys and values go to the cache.
void Session::store_keys_and_values(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  const int64_t d = config_.head_dim, q = config_.q_size(), kv = config_.kv_size(), half = d / 2;
  const int64_t heads = config_.heads, kv_heads = config_.kv_heads, items = heads + 2 * kv_heads;
  const auto add = [d](float* to, const float* bias) {
    for (int64_t c = 0; c < d; ++c) to[c] += bias[c];
  };
  const auto store = [&](const float* from, std::byte* to) {
    if (element_bytes_ == 4) {
      std::memcpy(to, from, d * sizeof(float));
    } else {
      kernels_.to_f16(from, reinterpret_cast<uint16_t*>(to), d);
    }
  };
  const auto [first, last] = member.part(pass.n * items);
  for (int64_t item = first; item < last; ++item) {
    const int64_t t = item / items, head = item % items;
    float* x = &qkv_[t * (q + 2 * kv) + head * d];
    const float* cosine = &(layer.sliding ? cosine_local_ : cosine_)[t * half];
    const float* sine = &(layer.sliding ? sine_local_ : sine_)[t * half];
    if (head < heads) {
      if (layer.q_bias) add(x, layer.q_bias + head * d);
      if (layer.q_norm) kernels_.rms_norm(x, layer.q_norm, d, config_.norm_eps, x);
      rotate(x, cosine, sine);
      for (int64_t c = 0; c < d; ++c) x[c] *= config_.attention_scale;  // once, instead of every score
    } else if (head < heads + kv_heads) {
      const int64_t h = head - heads;
      if (layer.k_bias) add(x, layer.k_bias + h * d);
      if (layer.k_norm) kernels_.rms_norm(x, layer.k_norm, d, config_.norm_eps, x);
      rotate(x, cosine, sine);
      store(x, cell(keys_, index, h, position_ + t));
    } else {
      const int64_t h = head - heads - kv_heads;
      if (layer.v_bias) add(x, layer.v_bias + h * d);
      store(x, cell(values_, index, h, position_ + t));
    }
  }
}

// `heads` heads from `head` on, which share their keys and values.
void Session::attend(Member& member, int64_t index, int64_t token, int64_t head, int64_t heads) {
  const Layer& layer = model_->layers()[index];
  const int64_t d = config_.head_dim, stride = config_.q_size() + 2 * config_.kv_size();
  const int64_t kv_head = head / (config_.heads / config_.kv_heads);
  const int64_t end = position_ + token + 1;
  const int64_t begin = layer.sliding ? std::max<int64_t>(0, end - config_.sliding_window) : 0;
  Vectors queries;
  queries.count = heads;
  queries.cols = d;
  queries.x = &qkv_[token * stride + head * d];
  float* all_scores = scratch_[member.rank()].scores.data();
  kernels_.dot(cached(keys_, index, kv_head), begin, end, queries, all_scores, context_);
  const Matrix values = cached(values_, index, kv_head);
  const float cap = config_.attention_softcap;
  for (int64_t h = 0; h < heads; ++h) {
    float* scores = all_scores + h * context_;
    if (cap > 0) {
      for (int64_t p = begin; p < end; ++p) scores[p] = cap * std::tanh(scores[p] / cap);
    }
    const float highest = kernels_.maximum(scores + begin, end - begin);
    const float inverse = 1.0f / kernels_.exp_sum(scores + begin, end - begin, highest);
    float* out = &attended_[token * config_.q_size() + (head + h) * d];
    std::fill(out, out + d, 0.0f);
    kernels_.axpy_listed(values, positions_.data() + begin, scores + begin, end - begin, out);
    for (int64_t c = 0; c < d; ++c) out[c] *= inverse;
  }
}

// ---- feed-forward ---------------------------------------------------------------------------------------------------

void Session::dense_ffn(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  const int64_t f = config_.ffn;
  float *gate = hidden_.data(), *up = gate + kPrefillBlock * f;
  const Inputs x = normed(member, pass.n, layer.ffn_norm, layer.gate);
  multiply(member, layer.gate, x, gate, f);
  multiply(member, layer.up, x, up, f);
  const auto combine = config_.activation == Activation::swiglu ? kernels_.swiglu : kernels_.geglu;
  const auto [first, last] = member.part(f, 16);
  for (int64_t t = 0; t < pass.n; ++t) {
    float* g = gate + t * f + first;
    const float* u = up + t * f + first;
    if (counts_) {
      for (int64_t j = 0; j < last - first; ++j) {
        counts_->gate[index * f + first + j] += g[j] > 0;
        counts_->up[index * f + first + j] += u[j] > 0;
      }
    }
    combine(g, u, last - first, g);
    if (counts_) {
      for (int64_t j = 0; j < last - first; ++j) counts_->h[index * f + first + j] += g[j] != 0;
    }
  }
  member.barrier();
  const Inputs h = prepare(member, pass.n, layer.down, gate, f, nullptr);
  add_to_residual(member, pass, layer.down, h, layer.post_ffn_norm);
}

void Session::sparse_ffn(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  if (member.rank() == 0) next_block_.store(0, std::memory_order_relaxed);
  const Inputs x = normed(member, pass.n, layer.ffn_norm, layer.gate);
  member.barrier();  // nobody takes a block before the counter is back at zero
  const int64_t blocks = model_->neuron_blocks();
  for (int64_t b; (b = next_block_.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
    neuron_block(scratch_[member.rank()], pass, index, b, x);
  }
  member.barrier();
  reduce_blocks(member, pass);
  if (layer.post_ffn_norm) {
    norm_into_residual(member, pass.n, layer.post_ffn_norm);
  } else {
    const auto [first, last] = member.part(config_.hidden, 16);
    for (int64_t t = 0; t < pass.n; ++t) {
      for (int64_t c = first; c < last; ++c) residual_[t * config_.hidden + c] += update_[t * config_.hidden + c];
    }
    member.barrier();
  }
}

// One block of neurons: gate, then up and down where they matter, into the block's own partial sum.
void Session::neuron_block(Scratch& s, const Pass& pass, int64_t index, int64_t block, const Inputs& x) {
  const Layer& layer = model_->layers()[index];
  const int64_t size = model_->neuron_block(), d = config_.hidden;
  const int64_t first = block * size, last = std::min(first + size, config_.ffn), n_neurons = last - first;
  const bool relu_up = config_.activation == Activation::drelu;
  const bool skip = pass.mode == Mode::exact;
  const bool list_up = skip && pass.decode && !counts_;  // in a prompt most rows of up are needed by some token
  // Row r is written at out + r: `first` is taken off, so that the block's rows land at the start of the buffer.
  product(s, layer.gate, first, last, x, s.gate.data() - first, size);
  if (!list_up) {
    product(s, layer.up, first, last, x, s.up.data() - first, size);
  }
  for (int64_t t = 0; t < pass.n; ++t) {
    const float* gate = &s.gate[t * size];
    const float* up = &s.up[t * size];
    const int64_t open = kernels_.positive(gate, n_neurons, s.open.data());
    if (list_up) {
      for (int64_t i = 0; i < open; ++i) s.active[i] = static_cast<int32_t>(first) + s.open[i];
      listed_product(s, layer.up, open, x, t);
    } else {
      for (int64_t i = 0; i < open; ++i) s.coefficient[i] = up[s.open[i]];
    }
    // h of the open neurons; those that are not zero move to the front.
    int64_t active = 0;
    for (int64_t i = 0; i < open; ++i) {
      float u = s.coefficient[i];
      if (relu_up && !(u > 0)) u = 0;
      const float h = gate[s.open[i]] * u;
      s.active[active] = static_cast<int32_t>(first) + s.open[i];
      s.coefficient[active] = h;
      active += h != 0;
    }
    if (counts_) {
      const int64_t base = index * config_.ffn + first;
      for (int64_t i = 0; i < open; ++i) counts_->gate[base + s.open[i]] += 1;
      for (int64_t j = 0; j < n_neurons; ++j) counts_->up[base + j] += up[j] > 0;
      for (int64_t i = 0; i < active; ++i) counts_->h[base + s.active[i] - first] += 1;
    }
    s.traffic.active_neurons += active;
    s.traffic.open_gates += open;
    int64_t listed = active;
    if (!skip) {  // dense mode reads every neuron, with the zeros in their places
      for (int64_t i = active - 1, j = n_neurons - 1; j >= 0; --j) {
        const auto neuron = static_cast<int32_t>(first + j);
        const bool fires = i >= 0 && s.active[i] == neuron;
        s.coefficient[j] = fires ? s.coefficient[i] : 0.0f;
        if (fires) --i;
        s.active[j] = neuron;
      }
      listed = n_neurons;
    }
    float* partial = &partial_[(block * kPrefillBlock + t) * d];
    std::fill(partial, partial + d, 0.0f);
    kernels_.axpy_listed(layer.down, s.active.data(), s.coefficient.data(), listed, partial);
    s.traffic.bytes += listed * layer.down.row_bytes;
  }
}

// update = sum of the blocks' partial sums, in block order.
void Session::reduce_blocks(Member& member, const Pass& pass) {
  const int64_t d = config_.hidden, blocks = model_->neuron_blocks();
  const auto [first, last] = member.part(d, 16);
  for (int64_t t = 0; t < pass.n; ++t) {
    float* update = &update_[t * d];
    std::fill(update + first, update + last, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* partial = &partial_[(b * kPrefillBlock + t) * d];
      for (int64_t c = first; c < last; ++c) update[c] += partial[c];
    }
  }
}

// ---- output ---------------------------------------------------------------------------------------------------------

void Session::head(Member& member, const Pass& pass) {
  const int64_t skipped = pass.n - pass.n_logits, vocab = config_.vocab;
  const Matrix& w = model_->head();
  const Inputs x = prepare(member, pass.n_logits, w, residual_.data() + skipped * config_.hidden, config_.hidden,
                           model_->output_norm());
  multiply(member, w, x, pass.logits, vocab);
  const float cap = config_.logit_softcap;
  if (cap <= 0) return;
  const auto [first, last] = member.part(vocab, 16);
  for (int64_t t = 0; t < pass.n_logits; ++t) {
    for (int64_t r = first; r < last; ++r) {
      float& logit = pass.logits[t * vocab + r];
      logit = cap * std::tanh(logit / cap);
    }
  }
}

}  // namespace turbosparse
