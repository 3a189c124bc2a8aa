// SPDX-License-Identifier: Apache-2.0
// What Python sees of lossless decoding: tokens in, the tokens that follow out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "lookup.h"
#include "speculation.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace turbosparse {
namespace {

using Output = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<int32_t> next_tokens(Speculation& self, int32_t token, int64_t most, const std::vector<int32_t>& ends,
                                 float temperature, int32_t top_k, float top_p, float min_p, float repetition_penalty,
                                 uint64_t seed, Output logits) {
  if (most < 1) throw std::invalid_argument("at least one token follows");
  if (static_cast<int64_t>(logits.size()) != self.vocab()) throw std::invalid_argument("wrong output size");
  const SamplingParams params{temperature, top_k, top_p, min_p, repetition_penalty, seed};
  const std::unordered_set<int32_t> last(ends.begin(), ends.end());
  const nb::gil_scoped_release unlocked;
  return self.next(token, most, last, params, logits.data());
}

nb::tuple drafting(const Speculation& self) {
  const Drafting& d = self.drafting();
  return nb::make_tuple(d.verifications, d.tokens, d.looked_up, d.looked_up_right, d.predicted, d.predicted_right);
}

void follow(Speculation& self, std::vector<int32_t> tokens, std::vector<uint8_t> agrees) {
  if (agrees.size() != tokens.size()) throw std::invalid_argument("a verdict for every token");
  for (const int32_t token : tokens) {
    if (token < 0 || token >= self.vocab()) throw std::invalid_argument("token id outside of the vocabulary");
  }
  self.follow({std::move(tokens), std::move(agrees)});
}

}  // namespace
}  // namespace turbosparse

void bind_speculation(nb::module_& m) {
  using namespace turbosparse;
  m.def(
      "lookup",
      [](const std::vector<int32_t>& text, int64_t most) {
        const Found found = lookup(text, most);
        return nb::make_tuple(found.length, found.tokens);
      },
      "text"_a, "most"_a);

  nb::class_<Costs>(m, "Costs")
      .def(nb::init<>())
      .def("verified", &Costs::verified, "rows"_a, "seconds"_a)
      .def("drafted", &Costs::drafted, "seconds"_a);

  nb::class_<Plan>(m, "Plan")  // for its tests: a speculation has its own
      .def(nb::init<Costs&>(), "costs"_a, nb::keep_alive<1, 2>())
      .def("looked_up", &Plan::looked_up, "found"_a, "most"_a)
      .def("predicted", &Plan::predicted, "most"_a)
      .def("judged", &Plan::judged, "found"_a, "came_true"_a);

  nb::class_<Speculation>(m, "Speculation")
      .def(nb::init<Forward&, Session&, Costs&, bool, bool>(), "forward"_a, "session"_a, "costs"_a, "predicts"_a,
           "dense"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("next", &next_tokens, "token"_a, "most"_a, "ends"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
           "repetition_penalty"_a, "seed"_a, "logits"_a)
      .def("follow", &follow, "tokens"_a, "agrees"_a)
      .def(
          "fix", [](Speculation& self, int64_t found, int64_t predicted) { self.plan().fix(found, predicted); },
          "found"_a, "predicted"_a)
      .def_prop_ro("drafting", &drafting);
}
