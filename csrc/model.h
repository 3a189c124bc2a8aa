// SPDX-License-Identifier: Apache-2.0
// The weights of a model, packed for one instruction set, and the sizes that say how to use them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counters.h"
#include "kernels/kernels.h"
#include "memory.h"
#include "pace.h"
#include "phases.h"
#include "sketch.h"
#include "team.h"

namespace turbosparse {

// What a predictor reads: the stream before the FFN's norm, or the FFN's input; or the gates are the scores, and there
// are no matrices.
enum class PredictorInput { residual, normed, gate };
enum class Activation { drelu, reglu, swiglu, geglu };

// Mirrors turbosparse.model.config.ModelConfig; see there for what each field means.
struct Config {
  int64_t layers = 0, hidden = 0, ffn = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
  float norm_eps = 0, attention_scale = 1, embedding_scale = 1, attention_softcap = 0, logit_softcap = 0;  // 0: none
  double rope_theta = 10000, rope_theta_local = 0, rope_scale = 1;  // theta_local 0: the same as theta
  bool rope_interleaved = false;
  int64_t sliding_window = 0;  // 0: none
  std::vector<bool> sliding_layers;
  Activation activation = Activation::swiglu;
  int64_t experts = 0, experts_used = 0;  // 0: a layer has one FFN, and no router
  int64_t neurons_per_gate = 1;           // neurons next to each other that share a row of the gate
  bool mirrored_ups = false;              // two of these share a row of the up, the second one with the other sign
  // One entry a layer, or none: the width of its predictor (0: it has none). And the score that selects a neuron, one
  // entry an FFN.
  std::vector<int64_t> predictor_ranks;
  std::vector<float> predictor_thresholds;
  std::vector<float> activation_thresholds;  // one a layer, or none: a smaller |h| becomes zero
  float gate_threshold = 0;                  // a positive gate below it counts as zero
  PredictorInput predictor_input = PredictorInput::residual;

  bool sparse() const { return activation == Activation::drelu || activation == Activation::reglu; }
  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
  int64_t ffns() const { return std::max<int64_t>(experts, 1); }            // of a layer
  int64_t ffns_used() const { return std::max<int64_t>(experts_used, 1); }  // by a token
  int64_t gate_rows() const { return ffn / neurons_per_gate; }
  int64_t neurons_per_up() const { return mirrored_ups ? 2 : 1; }
  int64_t up_rows() const { return ffn / neurons_per_up(); }
  bool slides(int64_t layer) const {
    return sliding_window > 0 && layer < static_cast<int64_t>(sliding_layers.size()) && sliding_layers[layer];
  }
  bool gates_predict() const { return predictor_input == PredictorInput::gate; }
  bool predicts() const { return gates_predict() || widest_predictor() > 0; }
  int64_t widest_predictor() const {
    return predictor_ranks.empty() ? 0 : *std::max_element(predictor_ranks.begin(), predictor_ranks.end());
  }
};

struct Ffn {
  Matrix gate, up, down;  // down is [ffn, hidden] (neuron by neuron) in a sparse model, else [hidden, ffn]
  Matrix fc1, fc2;        // the predictor, [rank, hidden] and [ffn, rank]; no rows where there is none
  float least_value = 0;  // a smaller |h| becomes zero
};

struct Layer {
  Matrix q, k, v, o;
  std::vector<Ffn> ffns;  // one, or the experts
  Matrix router;          // [experts, hidden]; no rows where there is one FFN
  const float* attention_norm = nullptr;
  const float* ffn_norm = nullptr;
  // Null where the family has none.
  const float* post_attention_norm = nullptr;
  const float* post_ffn_norm = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  const float* q_bias = nullptr;
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  bool sliding = false;
};

class Model {
 public:
  // `exact_fp32`: activations stay in fp32 and quantised weights are dequantised exactly.
  Model(Config config, const Kernels* kernels, bool exact_fp32, int threads);

  // Take a tensor of the GGUF file under its name there, or an expert's part of it. Throws std::invalid_argument on an
  // unknown name, a wrong shape or a wrong number of bytes.
  void set_matrix(const std::string& name, int64_t expert, WeightType type, int64_t rows, int64_t cols,
                  const std::byte* source, size_t bytes);
  void set_vector(const std::string& name, const float* values, int64_t size);
  // Called after every few megabytes of a matrix, whose source is not read again; forgotten by finish().
  void after_piece(std::function<void()> call) { after_piece_ = std::move(call); }

  // Check that nothing is missing, and make the tables. Throws std::invalid_argument.
  void finish();

  const Config& config() const { return config_; }
  const Kernels& kernels() const { return *kernels_; }
  bool exact_fp32() const { return exact_fp32_; }
  Team& team() { return team_; }
  Pace& pace() { return pace_; }        // of the sessions' jobs; `busy` guards it
  std::mutex& busy() { return busy_; }  // held by the session that runs, and by whoever reads the counters
  Traffic& traffic() { return traffic_; }
  bool times_phases() const { return times_phases_; }
  void time_phases(bool on) { times_phases_ = on; }
  PhaseTimes& phases() { return phases_; }  // of decoding while timing was on
  // How fast the members that decode read all weights once, fetched ahead as kernels do: what decoding could reach.
  // 10^9 bytes/s.
  double read_rate();
  Counts* counts() { return counts_.get(); }  // null while counting is off
  void count(bool on);
  const std::vector<Layer>& layers() const { return layers_; }
  bool predicts(int64_t layer) const { return config_.gates_predict() || layers_[layer].ffns[0].fc1.rows > 0; }
  const Matrix& embedding() const { return embedding_; }
  const Matrix& head() const { return head_.rows ? head_ : embedding_; }
  // Of the head; null where none pays, and as long as none is made.
  const Sketch* sketch() const { return sketch_.get(); }
  // An input of the head, of which the sketch wants to see a few. With the last of them it is made, by the team.
  void prepare_sketch(const float* x);
  const float* output_norm() const { return output_norm_; }
  size_t weight_bytes() const { return arena_.used() + (sketch_ ? sketch_->bytes() : 0); }

  // Radians a position turns pair i of a head by, [head_dim / 2], for layers that slide and for those that do not.
  const std::vector<double>& frequencies(bool sliding) const { return sliding ? local_frequencies_ : frequencies_; }

  // Inputs of products are worth a second int8 term: the weights lose less than one term would.
  bool fine_inputs() const { return layers_[0].ffns[0].up.type == WeightType::q8_0; }

  // What the predictor of each layer costs, over its gate; 0 where there is none, or only gates.
  std::vector<double> predictor_costs() const;

  // Neurons of a sparse FFN are summed in fixed blocks: few, so that partial sums stay small, and independent of
  // threads.
  int64_t neuron_block() const { return neuron_block_; }
  int64_t neuron_blocks() const { return (config_.ffn + neuron_block_ - 1) / neuron_block_; }

 private:
  Matrix* matrix_slot(const std::string& name, int64_t expert, int64_t rows, int64_t cols);
  bool is_ternary_gate(const std::string& name, WeightType type, int64_t rows, int64_t cols, const std::byte* source);
  void find_largest_scales(Matrix& down);

  Config config_;
  const Kernels* kernels_;
  bool exact_fp32_;
  Team team_;
  Pace pace_;
  std::mutex busy_;
  Traffic traffic_;
  bool times_phases_ = false;
  PhaseTimes phases_;
  std::unique_ptr<Counts> counts_;
  Arena arena_;
  std::function<void()> after_piece_;
  Matrix embedding_, head_;
  std::unique_ptr<Sketch> sketch_;
  bool sketchable_ = false;
  std::vector<double> squares_;  // of the inputs that it has seen, added up
  int seen_ = 0;
  const float* output_norm_ = nullptr;
  std::vector<float> rope_factors_;
  std::vector<Layer> layers_;
  std::vector<double> frequencies_, local_frequencies_;
  int64_t neuron_block_;
};

}  // namespace turbosparse
