// SPDX-License-Identifier: Apache-2.0
// What Python sees of the engine. It hands over whole tensors and gets whole logits; no row ever crosses this line.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "bandwidth.h"
#include "forward.h"
#include "model.h"
#include "pieces.h"
#include "sampler.h"
#include "session.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_kernels(nb::module_& m);      // bind_kernels.cpp
void bind_speculation(nb::module_& m);  // bind_speculation.cpp

namespace turbosparse {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counters = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<std::string> isas() {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->isa);
  return names;
}

// The table of that name; the best one for "".
const Kernels* kernels_named(const std::string& isa) {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (isa.empty() || isa == tables[i]->isa) return tables[i];
  }
  throw std::invalid_argument("this machine has no instruction set " + isa);
}

Activation activation_named(const std::string& name) {
  if (name == "drelu") return Activation::drelu;
  if (name == "reglu") return Activation::reglu;
  if (name == "swiglu") return Activation::swiglu;
  if (name == "geglu") return Activation::geglu;
  throw std::invalid_argument("unknown activation " + name);
}

PredictorInput predictor_input_named(const std::string& name) {
  if (name == "residual") return PredictorInput::residual;
  if (name == "normed") return PredictorInput::normed;
  if (name == "gate") return PredictorInput::gate;
  throw std::invalid_argument("unknown input of a predictor " + name);
}

// A ModelConfig of Python; None becomes 0.
Config config_from(nb::handle source) {
  const auto number = [&](const char* name) {
    const nb::object value = source.attr(name);
    return value.is_none() ? 0.0 : nb::cast<double>(value);
  };
  const auto count = [&](const char* name) {
    const nb::object value = source.attr(name);
    return value.is_none() ? int64_t{0} : nb::cast<int64_t>(value);
  };
  Config c;
  c.layers = count("n_layers");
  c.hidden = count("hidden_size");
  c.ffn = count("ffn_size");
  c.heads = count("n_heads");
  c.kv_heads = count("n_kv_heads");
  c.head_dim = count("head_dim");
  c.vocab = count("vocab_size");
  c.norm_eps = static_cast<float>(number("norm_eps"));
  c.attention_scale = static_cast<float>(number("attention_scale"));
  c.embedding_scale = static_cast<float>(number("embedding_scale"));
  c.attention_softcap = static_cast<float>(number("attention_softcap"));
  c.logit_softcap = static_cast<float>(number("logit_softcap"));
  c.rope_theta = number("rope_theta");
  c.rope_theta_local = number("rope_theta_local");
  c.rope_scale = number("rope_scale");
  c.rope_interleaved = nb::cast<bool>(source.attr("rope_interleaved"));
  c.sliding_window = count("sliding_window");
  for (const nb::handle layer : source.attr("sliding_layers")) c.sliding_layers.push_back(nb::cast<bool>(layer));
  c.gate_threshold = static_cast<float>(number("gate_threshold"));
  c.activation = activation_named(nb::cast<std::string>(source.attr("activation")));
  c.experts = count("experts");
  c.experts_used = count("experts_used");
  c.neurons_per_gate = count("neurons_per_gate");
  c.mirrored_ups = nb::cast<bool>(source.attr("mirrored_ups"));
  if (const nb::object predictor = source.attr("predictor"); !predictor.is_none()) {
    c.predictor_ranks = nb::cast<std::vector<int64_t>>(predictor.attr("ranks"));
    c.predictor_thresholds = nb::cast<std::vector<float>>(predictor.attr("thresholds"));
    c.predictor_input = predictor_input_named(nb::cast<std::string>(predictor.attr("input")));
  }
  if (const nb::object thresholds = source.attr("activation_thresholds"); !thresholds.is_none()) {
    c.activation_thresholds = nb::cast<std::vector<float>>(thresholds);
  }
  if (c.layers < 1 || c.hidden < 1 || c.ffn < 1 || c.vocab < 1 || c.heads < 1 || c.kv_heads < 1 || c.head_dim < 2 ||
      c.heads % c.kv_heads != 0 || c.head_dim % 2 != 0 || c.rope_scale <= 0 || c.experts < 0 || c.experts_used < 0 ||
      c.experts_used > c.experts || (c.experts > 0) != (c.experts_used > 0) || c.neurons_per_gate < 1 ||
      c.ffn % c.neurons_per_gate != 0 || (c.neurons_per_gate > 1 && (!c.sparse() || c.experts > 0)) ||
      (c.mirrored_ups && (c.activation != Activation::drelu || c.neurons_per_gate % 2 != 0)) ||
      c.predictor_thresholds.size() != c.predictor_ranks.size() * c.ffns() ||
      (!c.predictor_ranks.empty() && static_cast<int64_t>(c.predictor_ranks.size()) != c.layers) ||
      (!c.activation_thresholds.empty() && static_cast<int64_t>(c.activation_thresholds.size()) != c.layers)) {
    throw std::invalid_argument("impossible sizes");
  }
  return c;
}

WeightType weight_type(int type) {
  for (const WeightType known :
       {WeightType::f32, WeightType::f16, WeightType::bf16, WeightType::q8_0, WeightType::q4_0}) {
    if (static_cast<int>(known) == type) return known;
  }
  throw std::invalid_argument("no kernels for ggml type " + std::to_string(type));
}

Mode mode_named(const std::string& name) {
  if (name == "dense") return Mode::dense;
  if (name == "exact") return Mode::exact;
  if (name == "predicted") return Mode::predicted;
  if (name == "auto") return Mode::automatic;
  if (name == "auto-predicted") return Mode::automatic_predicted;
  throw std::invalid_argument("unknown mode " + name);
}

void read_tokens(Forward& forward, Session& session, Tokens tokens, const std::string& mode, bool all_logits,
                 Output logits) {
  const int64_t rows = all_logits ? static_cast<int64_t>(tokens.size()) : 1;
  if (static_cast<int64_t>(logits.size()) != rows * forward.vocab()) throw std::invalid_argument("wrong output size");
  const Mode chosen = mode_named(mode);
  const nb::gil_scoped_release unlocked;
  forward.read(session, tokens.data(), static_cast<int64_t>(tokens.size()), chosen, all_logits, logits.data());
}

void decode_tokens(Forward& forward, const std::vector<Session*>& sessions, Tokens tokens, const std::string& mode,
                   Output logits) {
  if (sessions.size() != tokens.size()) throw std::invalid_argument("one token a session");
  if (logits.size() != sessions.size() * static_cast<size_t>(forward.vocab())) {
    throw std::invalid_argument("wrong output size");
  }
  const Mode chosen = mode_named(mode);
  const nb::gil_scoped_release unlocked;
  forward.decode(sessions.data(), tokens.data(), static_cast<int64_t>(sessions.size()), chosen, logits.data());
}

int32_t draw_token(Forward& forward, Session& session, int32_t token, const std::string& mode, float temperature,
                   int32_t top_k, float top_p, float min_p, float repetition_penalty, uint64_t seed) {
  const SamplingParams params{temperature, top_k, top_p, min_p, repetition_penalty, seed};
  const Mode chosen = mode_named(mode);
  const nb::gil_scoped_release unlocked;
  return forward.draw(session, token, chosen, params);
}

// How each layer is computed in the automatic modes.
std::vector<std::string> choices(const Session& session) {
  std::vector<std::string> names;
  for (size_t layer = 0; layer < session.layers(); ++layer) {
    const Mode mode = session.choice().of(static_cast<int64_t>(layer));
    names.emplace_back(mode == Mode::dense ? "dense" : mode == Mode::exact ? "exact" : "predicted");
  }
  return names;
}

// What the audit of a session found: (position, recall, kept, kl) of every token, (fired, hit, mass, kept) of every
// layer, and (position, layer, kept, by) of every move.
nb::tuple audit_of(const Session& session) {
  nb::list tokens, layers, moves;
  for (const Verdict& v : session.audit().verdicts()) {
    tokens.append(nb::make_tuple(v.position, v.recall, v.kept, v.kl));
  }
  for (const LayerVerdict& v : session.audit().layers()) layers.append(nb::make_tuple(v.fired, v.hit, v.mass, v.kept));
  for (const Move& m : session.audit().moves()) moves.append(nb::make_tuple(m.position, m.layer, m.kept, m.by));
  return nb::make_tuple(tokens, layers, moves);
}

int64_t read_counts(Model& model, Counters routed, Counters gate, Counters up, Counters h, Counters selected,
                    Counters hit, Sums mass, Sums missed, bool reset) {
  const nb::gil_scoped_release unlocked;
  const std::lock_guard<std::mutex> lock(model.busy());
  const Counts* counts = model.counts();
  if (!counts) throw std::invalid_argument("counting is off");
  const auto copy = [](const auto& from, auto& to) {
    if (to.size() != from.size()) throw std::invalid_argument("wrong output size");
    std::copy(from.begin(), from.end(), to.data());
  };
  copy(counts->routed, routed);
  copy(counts->gate, gate);
  copy(counts->up, up);
  copy(counts->h, h);
  copy(counts->selected, selected);
  copy(counts->hit, hit);
  copy(counts->mass, mass);
  copy(counts->missed, missed);
  const int64_t tokens = counts->tokens;
  if (reset) model.count(true);
  return tokens;
}

nb::tuple read_traffic(Model& model, bool reset) {
  Traffic t;
  {
    const nb::gil_scoped_release unlocked;
    const std::lock_guard<std::mutex> lock(model.busy());
    t = model.traffic();
    if (reset) model.traffic() = Traffic{};
  }
  return nb::make_tuple(t.tokens, t.bytes, t.active_neurons, t.open_gates, t.selected_neurons);
}

// [(phase, seconds, seconds of waiting among them, bytes)].
nb::list read_phases(Model& model, bool reset) {
  PhaseTimes times;
  {
    const nb::gil_scoped_release unlocked;
    const std::lock_guard<std::mutex> lock(model.busy());
    times = model.phases();
    if (reset) model.phases() = PhaseTimes{};
  }
  nb::list phases;
  for (size_t p = 0; p < kPhases; ++p) {
    const auto& sums = times.phases[p];
    phases.append(nb::make_tuple(kPhaseNames[p], 1e-9 * sums.nanoseconds, 1e-9 * sums.waited, sums.bytes));
  }
  return phases;
}

int32_t sample_from(Floats logits, const SamplingParams& params, const std::vector<int32_t>& history,
                    uint64_t position) {
  const auto vocab = static_cast<int64_t>(logits.size());
  if (vocab == 0) throw std::invalid_argument("no logits");
  for (const int32_t id : history) {
    if (id < 0 || id >= vocab) throw std::invalid_argument("token id outside of the vocabulary");
  }
  return sample(logits.data(), vocab, params, history, position);
}

}  // namespace
}  // namespace turbosparse

NB_MODULE(_native, m) {
  using namespace turbosparse;
  m.doc() = "The native CPU engine of TurboSparse.";
  m.attr("PREFILL_BLOCK") = kMostRows;
  m.def("isas", &isas);
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "threads"_a, "passes"_a = 5,
        nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Pace>(m, "Pace")  // for its tests: the engine has its own
      .def(
          "__init__",
          [](Pace* self, int most) {
            if (most < 1) throw std::invalid_argument("a team has at least 1 member");
            new (self) Pace(most);
          },
          "most"_a)
      .def("report", &Pace::report, "stalled"_a)
      .def_prop_ro("size", &Pace::size);

  nb::class_<Pieces>(m, "Pieces")  // for its tests, too
      .def(nb::init<>())
      .def(
          "next",
          [](Pieces& self, uint32_t work, int64_t total, int64_t least, int members) {
            const auto [first, last] = self.next(work, total, least, members);
            return nb::make_tuple(first, last);
          },
          "work"_a, "total"_a, "least"_a, "members"_a);

  nb::class_<Model>(m, "Model")
      .def(
          "__init__",
          [](Model* self, nb::object config, const std::string& isa, bool exact_fp32, int threads) {
            if (threads < 1) throw std::invalid_argument("threads must be at least 1");
            new (self) Model(config_from(config), kernels_named(isa), exact_fp32, threads);
          },
          "config"_a, "isa"_a, "exact_fp32"_a, "threads"_a)
      .def(
          "set_matrix",
          [](Model& self, const std::string& name, int64_t expert, int type, int64_t rows, int64_t cols, Bytes data) {
            const nb::gil_scoped_release unlocked;
            self.set_matrix(name, expert, weight_type(type), rows, cols,
                            reinterpret_cast<const std::byte*>(data.data()), data.size());
          },
          "name"_a, "expert"_a, "type"_a, "rows"_a, "cols"_a, "data"_a)
      .def(
          "set_vector",
          [](Model& self, const std::string& name, Floats values) {
            self.set_vector(name, values.data(), static_cast<int64_t>(values.size()));
          },
          "name"_a, "values"_a)
      .def("after_piece", &Model::after_piece, "call"_a)
      .def("finish", &Model::finish)
      .def(
          "count",
          [](Model& self, bool on) {
            const nb::gil_scoped_release unlocked;
            const std::lock_guard<std::mutex> lock(self.busy());
            self.count(on);
          },
          "on"_a)
      .def("read_counts", &read_counts, "routed"_a, "gate"_a, "up"_a, "h"_a, "selected"_a, "hit"_a, "mass"_a,
           "missed"_a, "reset"_a)
      .def("read_traffic", &read_traffic, "reset"_a)
      .def(
          "time_phases",
          [](Model& self, bool on) {
            const nb::gil_scoped_release unlocked;
            const std::lock_guard<std::mutex> lock(self.busy());
            self.time_phases(on);
          },
          "on"_a)
      .def("read_phases", &read_phases, "reset"_a)
      .def("read_rate",
           [](Model& self) {
             const nb::gil_scoped_release unlocked;
             const std::lock_guard<std::mutex> lock(self.busy());
             return self.read_rate();
           })
      .def_prop_ro("isa", [](Model& self) { return std::string(self.kernels().isa); })
      .def_prop_ro("weight_bytes", [](Model& self) {
        const nb::gil_scoped_release unlocked;
        const std::lock_guard<std::mutex> lock(self.busy());
        return self.weight_bytes();
      });

  nb::class_<Session>(m, "Session")
      .def(
          "__init__",
          [](Session* self, std::shared_ptr<Model> model, int64_t context, int cache_type) {
            new (self) Session(model, context, weight_type(cache_type));
          },
          "model"_a, "context"_a, "cache_type"_a)
      .def("truncate", &Session::truncate, "position"_a)
      .def("begin_audit", &Session::begin_audit, "share"_a, "seed"_a, "promised"_a)
      .def_prop_ro("audit", &audit_of)
      .def_prop_ro("position", &Session::position)
      .def_prop_ro("tokens", &Session::tokens)
      .def_prop_ro("context", &Session::context)
      .def_prop_ro("cache_bytes", &Session::cache_bytes)
      .def_prop_ro("choices", &choices);

  nb::class_<Forward>(m, "Forward")
      .def(
          "__init__", [](Forward* self, std::shared_ptr<Model> model) { new (self) Forward(model); }, "model"_a)
      .def("read", &read_tokens, "session"_a, "tokens"_a, "mode"_a, "all_logits"_a, "logits"_a)
      .def("decode", &decode_tokens, "sessions"_a, "tokens"_a, "mode"_a, "logits"_a)
      .def("draw", &draw_token, "session"_a, "token"_a, "mode"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
           "repetition_penalty"_a, "seed"_a);

  m.def(
      "sample",
      [](Floats logits, std::vector<int32_t> history, uint64_t position, float temperature, int32_t top_k, float top_p,
         float min_p, float repetition_penalty, uint64_t seed) {
        const SamplingParams params{temperature, top_k, top_p, min_p, repetition_penalty, seed};
        return sample_from(logits, params, history, position);
      },
      "logits"_a, "history"_a, "position"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a,
      "seed"_a);
  bind_speculation(m);
  bind_kernels(m);
}
