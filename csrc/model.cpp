// SPDX-License-Identifier: Apache-2.0
#include "model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "bandwidth.h"
#include "kernels/ternary.h"

namespace turbosparse {
namespace {

// A block of neurons costs a partial sum and a wait for its first rows, whatever its size; threads want many to share.
constexpr int64_t kBlocks = 8, kMostBlocks = 16;
constexpr int64_t kLargeBlock = 192;                // neurons; FFNs with more than kBlocks of them have more blocks
constexpr int64_t kPieceBytes = int64_t{16} << 20;  // of a matrix, packed between two calls of after_piece

// Bytes of a row in ggml's own layout.
int64_t source_row_bytes(WeightType type, int64_t cols) {
  switch (type) {
    case WeightType::f32:
      return cols * 4;
    case WeightType::f16:
    case WeightType::bf16:
      return cols * 2;
    case WeightType::q8_0:
      return cols / kBlock * 34;
    case WeightType::q4_0:
      return cols / kBlock * 18;
    case WeightType::ternary:
      break;  // is in no file
  }
  return 0;
}

bool has_blocks(WeightType type) { return type == WeightType::q8_0 || type == WeightType::q4_0; }

// "blk.<layer>.<part>" to (layer, part); layer -1 for names outside of blocks.
std::pair<int64_t, std::string> split(const std::string& name) {
  long long layer = 0;
  int used = 0;
  if (std::sscanf(name.c_str(), "blk.%lld.%n", &layer, &used) == 1 && used > 0) return {layer, name.substr(used)};
  return {-1, name};
}

std::vector<double> frequencies_of(double theta, double scale, int64_t head_dim, const std::vector<float>& factors) {
  std::vector<double> frequencies(head_dim / 2);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    frequencies[i] = std::pow(theta, -2.0 * i / head_dim) / scale;
    if (!factors.empty()) frequencies[i] /= factors[i];
  }
  return frequencies;
}

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Model::Model(Config config, const Kernels* kernels, bool exact_fp32, int threads)
    : config_(std::move(config)),
      kernels_(kernels),
      exact_fp32_(exact_fp32),
      team_(threads),
      pace_(threads),
      layers_(config_.layers) {
  const auto share = [&](int64_t blocks) { return (config_.ffn + blocks - 1) / blocks; };
  const int64_t per_block = std::max(share(kMostBlocks), std::min(share(kBlocks), kLargeBlock));
  neuron_block_ = (per_block + kBlock - 1) / kBlock * kBlock;
  for (Layer& layer : layers_) layer.ffns.resize(config_.ffns());
}

Matrix* Model::matrix_slot(const std::string& name, int64_t expert, int64_t rows, int64_t cols) {
  const Config& c = config_;
  if (expert < 0 || expert >= c.ffns()) fail("no such expert of " + name);
  struct Entry {
    Matrix* slot;
    int64_t rows, cols;
  };
  std::map<std::string, Entry> entries;
  const auto [layer, part] = split(name);
  if (layer < 0) {
    entries = {{"token_embd.weight", {&embedding_, c.vocab, c.hidden}}, {"output.weight", {&head_, c.vocab, c.hidden}}};
  } else if (layer < c.layers) {
    Layer& l = layers_[layer];
    Ffn& ffn = l.ffns[expert];
    const std::string end = c.experts > 0 ? "_exps.weight" : ".weight";
    entries = {
        {"attn_q.weight", {&l.q, c.q_size(), c.hidden}},          {"attn_k.weight", {&l.k, c.kv_size(), c.hidden}},
        {"attn_v.weight", {&l.v, c.kv_size(), c.hidden}},         {"attn_output.weight", {&l.o, c.hidden, c.q_size()}},
        {"ffn_gate" + end, {&ffn.gate, c.gate_rows(), c.hidden}}, {"ffn_up" + end, {&ffn.up, c.up_rows(), c.hidden}}};
    if (c.experts > 0) entries["ffn_gate_inp.weight"] = {&l.router, c.experts, c.hidden};
    if (c.sparse()) {
      entries["ffn_down_t" + end] = {&ffn.down, c.ffn, c.hidden};
    } else {
      entries["ffn_down" + end] = {&ffn.down, c.hidden, c.ffn};
    }
    if (const int64_t rank = c.predictor_ranks.empty() ? 0 : c.predictor_ranks[layer]; rank > 0) {
      entries["fc1" + end] = {&ffn.fc1, rank, c.hidden};
      entries["fc2" + end] = {&ffn.fc2, c.ffn, rank};
    }
  }
  const auto found = entries.find(part);
  if (found == entries.end()) fail("unknown matrix " + name);
  if (found->second.rows != rows || found->second.cols != cols) fail("wrong shape of " + name);
  return found->second.slot;
}

void Model::set_matrix(const std::string& name, int64_t expert, WeightType type, int64_t rows, int64_t cols,
                       const std::byte* source, size_t bytes) {
  Matrix* slot = matrix_slot(name, expert, rows, cols);
  if (has_blocks(type) && cols % kBlock != 0) fail("columns of " + name + " are not whole blocks");
  const int64_t row_bytes = source_row_bytes(type, cols);
  if (row_bytes <= 0 || bytes != static_cast<size_t>(row_bytes) * rows) fail("wrong number of bytes of " + name);
  const bool ternary = is_ternary_gate(name, type, rows, cols, source);
  const WeightType packed = ternary ? WeightType::ternary : type;
  std::byte* storage = arena_.take(kernels_->packed_bytes(packed, rows, cols));
  *slot = kernels_->layout(packed, rows, cols, storage);
  const int64_t step = std::max<int64_t>(kPieceBytes / row_bytes, 1);
  for (int64_t begin = 0; begin < rows; begin += step) {
    team_.run([&](Member& member) {
      const auto [first, last] = member.part(std::min(step, rows - begin), 64);
      if (first >= last) return;
      const std::byte* part = source + (begin + first) * row_bytes;
      if (ternary) {
        pack_ternary(*slot, storage, begin + first, begin + last, type, part);
      } else {
        kernels_->pack(*slot, storage, begin + first, begin + last, part);
      }
    });
    if (after_piece_) after_piece_();
  }
  if (has_blocks(type) && !exact_fp32_ && name.find(".ffn_down_t") != std::string::npos) find_largest_scales(*slot);
}

// Whether a gate holds three values a row and is packed as such: it is what exact mode reads most of. In fp32 it is
// read as the file says.
bool Model::is_ternary_gate(const std::string& name, WeightType type, int64_t rows, int64_t cols,
                            const std::byte* source) {
  const bool gate = name.find(".ffn_gate.") != std::string::npos || name.find(".ffn_gate_exps.") != std::string::npos;
  if (!gate || !has_blocks(type) || exact_fp32_) return false;
  if (!is_ternary(type, std::min<int64_t>(rows, 1), cols, source)) return false;  // most gates are none
  std::atomic<bool> all = true;
  team_.run([&](Member& member) {
    const auto [first, last] = member.part(rows, 64);
    if (!is_ternary(type, last - first, cols, source + first * source_row_bytes(type, cols))) all = false;
  });
  return all;
}

// What sums over neurons need (kernels/sums.h).
void Model::find_largest_scales(Matrix& down) {
  auto* largest = reinterpret_cast<float*>(arena_.take(down.rows * sizeof(float)));
  team_.run([&](Member& member) {
    const auto [first, last] = member.part(down.rows, 64);
    kernels_->largest_scales(down, first, last, largest);
  });
  down.largest = largest;
}

void Model::set_vector(const std::string& name, const float* values, int64_t size) {
  const Config& c = config_;
  const auto [layer, part] = split(name);
  if (name == "rope_freqs.weight") {
    if (size != c.head_dim / 2) fail("wrong shape of " + name);
    rope_factors_.assign(values, values + size);
    return;
  }
  struct Entry {
    const float** slot;
    int64_t size;
  };
  std::map<std::string, Entry> entries;
  if (layer < 0) {
    entries = {{"output_norm.weight", {&output_norm_, c.hidden}}};
  } else if (layer < c.layers) {
    Layer& l = layers_[layer];
    entries = {{"attn_norm.weight", {&l.attention_norm, c.hidden}},
               {"ffn_norm.weight", {&l.ffn_norm, c.hidden}},
               {"post_attention_norm.weight", {&l.post_attention_norm, c.hidden}},
               {"post_ffw_norm.weight", {&l.post_ffn_norm, c.hidden}},
               {"attn_q_norm.weight", {&l.q_norm, c.head_dim}},
               {"attn_k_norm.weight", {&l.k_norm, c.head_dim}},
               {"attn_q.bias", {&l.q_bias, c.q_size()}},
               {"attn_k.bias", {&l.k_bias, c.kv_size()}},
               {"attn_v.bias", {&l.v_bias, c.kv_size()}}};
  }
  const auto found = entries.find(part);
  if (found == entries.end()) fail("unknown vector " + name);
  if (found->second.size != size) fail("wrong shape of " + name);
  float* copy = reinterpret_cast<float*>(arena_.take(size * sizeof(float)));
  std::memcpy(copy, values, size * sizeof(float));
  *found->second.slot = copy;
}

std::vector<double> Model::predictor_costs() const {
  std::vector<double> costs;
  for (const Layer& l : layers_) {
    const Ffn& ffn = l.ffns[0];
    const auto bytes = static_cast<double>(ffn.fc1.rows * ffn.fc1.row_bytes + ffn.fc2.rows * ffn.fc2.row_bytes);
    costs.push_back(bytes / static_cast<double>(ffn.gate.rows * ffn.gate.row_bytes));
  }
  return costs;
}

void Model::prepare_sketch(const float* x) {
  constexpr int kEnough = 8;  // twice as many would leave 2 % fewer rows to compute
  const bool numbers = std::all_of(x, x + config_.hidden, [](float value) { return std::isfinite(value); });
  if (!sketchable_ || !numbers) return;
  squares_.resize(config_.hidden);
  for (int64_t c = 0; c < config_.hidden; ++c) squares_[c] += static_cast<double>(x[c]) * x[c];
  if (++seen_ < kEnough) return;
  sketchable_ = false;
  sketch_ = std::make_unique<Sketch>(*kernels_, head(), squares_, team_);
  if (!std::isfinite(sketch_->largest())) sketch_.reset();
}

double Model::read_rate() { return turbosparse::read_rate(team_, pace_.size(), arena_.parts()); }

void Model::count(bool on) {
  counts_.reset(on ? new Counts : nullptr);
  if (!on) return;
  counts_->routed.resize(config_.layers * config_.ffns());
  for (auto* counts : {&counts_->gate, &counts_->up, &counts_->h, &counts_->selected, &counts_->hit}) {
    counts->resize(config_.layers * config_.ffns() * config_.ffn);
  }
  for (auto* sums : {&counts_->mass, &counts_->missed}) sums->resize(counts_->h.size());
}

void Model::finish() {
  after_piece_ = nullptr;
  if (!embedding_.rows || !output_norm_) fail("the embedding or the output norm is missing");
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& l = layers_[i];
    bool whole = l.q.rows && l.k.rows && l.v.rows && l.o.rows && l.attention_norm && l.ffn_norm;
    whole = whole && (l.router.rows > 0) == (config_.experts > 0);
    for (size_t e = 0; e < l.ffns.size(); ++e) {
      Ffn& ffn = l.ffns[e];
      whole = whole && ffn.gate.rows && ffn.up.rows && ffn.down.rows;
      if (!config_.activation_thresholds.empty()) ffn.least_value = config_.activation_thresholds[i];
      if (config_.predictor_ranks.empty()) continue;
      whole = whole && (config_.predictor_ranks[i] > 0) == (ffn.fc1.rows && ffn.fc2.rows);
    }
    if (!whole) fail("a tensor of layer " + std::to_string(i) + " is missing");
    // Outputs of experts are added to the stream one by one.
    if (l.router.rows && l.post_ffn_norm) fail("experts whose sum is normed are not supported");
    l.sliding = config_.slides(static_cast<int64_t>(i));
  }
  sketchable_ = !exact_fp32_ && Sketch::pays(*kernels_, head());
  const Config& c = config_;
  frequencies_ = frequencies_of(c.rope_theta, c.rope_scale, c.head_dim, rope_factors_);
  // A family with a base of its own for sliding layers scales positions in the others only (Gemma 3).
  local_frequencies_ = c.rope_theta_local > 0 ? frequencies_of(c.rope_theta_local, 1.0, c.head_dim, {}) : frequencies_;
}

}  // namespace turbosparse
