// SPDX-License-Identifier: Apache-2.0
// Attention over the KV caches of the rows' sequences.
#include <algorithm>
#include <cmath>

#include "forward.h"

namespace turbosparse {
namespace {

constexpr int64_t kTogether = 128;  // values that stay in the first-level cache over all heads that share them

}  // namespace

void Forward::attention(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  const int64_t q = config_.q_size(), kv = config_.kv_size(), stride = q + 2 * kv;
  const Inputs x = normed(member, pass.n, layer.attention_norm, layer.q);
  enter(member, Phase::qkv);
  multiply(member, layer.q, x, qkv_.data(), stride);
  multiply(member, layer.k, x, qkv_.data() + q, stride);
  multiply(member, layer.v, x, qkv_.data() + q + kv, stride);
  member.barrier();
  enter(member, Phase::attention);
  store_keys_and_values(member, pass, index);
  member.barrier();
  // Heads that share keys are scored together, so that a key is read once, unless that leaves a member idle.
  const int64_t groups = pass.n * config_.kv_heads;
  const bool even = groups % member.size() == 0 || groups >= 8 * member.size();
  const int64_t together = even ? config_.heads / config_.kv_heads : 1;
  const int64_t items = config_.heads / together;
  const auto [first, last] = member.part(pass.n * items);
  for (int64_t item = first; item < last; ++item) {
    attend(scratch_[member.rank()], pass, index, item / items, item % items * together, together);
  }
  member.barrier();
  const Inputs attended = prepare(member, pass.n, layer.o, attended_.data(), q, nullptr);
  enter(member, Phase::attention_output);
  add_to_residual(member, pass, layer.o, attended, layer.post_attention_norm);
}

void Forward::rotate(float* head, const float* cosine, const float* sine) const {
  const int64_t half = config_.head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    float& a = config_.rope_interleaved ? head[2 * i] : head[i];
    float& b = config_.rope_interleaved ? head[2 * i + 1] : head[i + half];
    const float x = a, y = b;
    a = x * cosine[i] - y * sine[i];
    b = y * cosine[i] + x * sine[i];
  }
}

// Bias, norm and rotation of the new queries and keys; keys and values go to the caches.
void Forward::store_keys_and_values(Member& member, const Pass& pass, int64_t index) {
  const Layer& layer = model_->layers()[index];
  const int64_t d = config_.head_dim, q = config_.q_size(), kv = config_.kv_size(), half = d / 2;
  const int64_t heads = config_.heads, kv_heads = config_.kv_heads, items = heads + 2 * kv_heads;
  const auto add = [d](float* to, const float* bias) {
    for (int64_t c = 0; c < d; ++c) to[c] += bias[c];
  };
  const auto [first, last] = member.part(pass.n * items);
  for (int64_t item = first; item < last; ++item) {
    const int64_t t = item / items, head = item % items;
    float* x = &qkv_[t * (q + 2 * kv) + head * d];
    const float* cosine = &(layer.sliding ? cosine_local_ : cosine_)[t * half];
    const float* sine = &(layer.sliding ? sine_local_ : sine_)[t * half];
    KvCache& cache = pass.rows[t].session->cache_;
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
      cache.store_key(index, h, pass.rows[t].position, x);
    } else {
      const int64_t h = head - heads - kv_heads;
      if (layer.v_bias) add(x, layer.v_bias + h * d);
      cache.store_value(index, h, pass.rows[t].position, x);
    }
  }
}

// `heads` heads of a row from `head` on, which share their keys and values. Positions are visited in their order,
// though in a sliding layer the first of them may lie behind the last in the cache.
void Forward::attend(Scratch& scratch, const Pass& pass, int64_t index, int64_t row, int64_t head, int64_t heads) {
  const Layer& layer = model_->layers()[index];
  const KvCache& cache = pass.rows[row].session->cache_;
  const int64_t d = config_.head_dim, stride = config_.q_size() + 2 * config_.kv_size();
  const int64_t kv_head = head / (config_.heads / config_.kv_heads), cells = cache.cells(index);
  const int64_t end = pass.rows[row].position + 1;
  const int64_t begin = layer.sliding ? std::max<int64_t>(0, end - config_.sliding_window) : 0;
  const int64_t count = end - begin, cell = begin % cells, before_wrap = std::min(count, cells - cell);
  const Matrix& keys = cache.keys(index, kv_head);
  const Matrix& values = cache.values(index, kv_head);
  // Heads that share keys find them in a cache after the first.
  if (head % (config_.heads / config_.kv_heads) == 0) scratch.clock.read(count * (keys.row_bytes + values.row_bytes));
  const Vectors queries = queries_of(scratch, cache, &qkv_[row * stride + head * d], heads);
  float* all_scores = scratch.scores.data();
  kernels_.dot(keys, cell, cell + before_wrap, queries, all_scores - cell, count);
  if (before_wrap < count) kernels_.dot(keys, 0, count - before_wrap, queries, all_scores + before_wrap, count);
  float* out = &attended_[row * config_.q_size() + head * d];
  std::fill(out, out + heads * d, 0.0f);
  float* inverse = scratch.inverse.data();
  const float cap = config_.attention_softcap;
  for (int64_t h = 0; h < heads; ++h) {
    float* scores = all_scores + h * count;
    if (cap > 0) {
      for (int64_t p = 0; p < count; ++p) scores[p] = cap * std::tanh(scores[p] / cap);
    }
    inverse[h] = 1.0f / kernels_.exp_sum(scores, count, kernels_.maximum(scores, count));
  }
  for (int64_t p = 0; p < count;) {
    const int64_t at = p < before_wrap ? cell + p : p - before_wrap;
    const int64_t n = std::min(kTogether, (p < before_wrap ? before_wrap : count) - p);
    for (int64_t h = 0; h < heads; ++h) {
      kernels_.axpy_listed(values, &cells_[at], all_scores + h * count + p, n, out + h * d);
    }
    p += n;
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t c = 0; c < d; ++c) out[h * d + c] *= inverse[h];
  }
}

// The queries of `heads` heads, quantised where the keys are.
Vectors Forward::queries_of(Scratch& scratch, const KvCache& cache, const float* x, int64_t heads) {
  const int64_t d = config_.head_dim, blocks = d / kBlock;
  Prepared& into = scratch.queries;
  Vectors queries;
  queries.count = heads;
  queries.cols = d;
  queries.x = x;
  if (cache.type() != WeightType::q8_0 || model_->exact_fp32()) return queries;
  for (int64_t h = 0; h < heads; ++h) {
    kernels_.quantize(x + h * d, d, &into.q[h * d], &into.scale[h * blocks], &into.sum[h * blocks]);
  }
  queries.q = into.q.data();
  queries.scale = into.scale.data();
  queries.sum = into.sum.data();
  return queries;
}

}  // namespace turbosparse
