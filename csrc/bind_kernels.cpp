// SPDX-License-Identifier: Apache-2.0
// The kernels one by one, for tests and benchmarks: `_native.kernels`. Sizes and indices are checked here, since no
// kernel checks any. Results go into arrays of the caller, so that a benchmark measures the kernel alone.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace turbosparse {
namespace {

template <class T, size_t kDims>
using Array = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
using Floats = Array<const float, 1>;
using Halves = Array<const uint16_t, 1>;
using Indices = Array<const int32_t, 1>;
using FloatsOut = Array<float, 1>;

void require(bool fine, const char* otherwise) {
  if (!fine) throw std::invalid_argument(otherwise);
}

template <class A>
int64_t length(const A& array) {
  return static_cast<int64_t>(array.size());
}

const Kernels& table(const std::string& isa) {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (isa == tables[i]->isa) return *tables[i];
  }
  throw std::invalid_argument("this machine has no instruction set " + isa);
}

std::vector<std::string> isas() {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->isa);
  return names;
}

bool blocked(WeightType type) { return type == WeightType::q4_0 || type == WeightType::q8_0; }

int64_t source_row_bytes(WeightType type, int64_t cols) {
  switch (type) {
    case WeightType::f32:
      return cols * 4;
    case WeightType::f16:
    case WeightType::bf16:
      return cols * 2;
    case WeightType::q4_0:
      return cols / kBlock * 18;
    case WeightType::q8_0:
      return cols / kBlock * 34;
  }
  throw std::invalid_argument("no kernels for this ggml type");
}

// Vectors [count, cols] and, unless exact, their quants.
struct PreparedVectors {
  std::vector<float> x, scale;
  std::vector<int8_t> q;
  std::vector<int32_t> sum;
  Vectors view;

  PreparedVectors(const Kernels& kernels, Array<const float, 2> values, bool exact)
      : x(values.data(), values.data() + values.size()) {
    view = {
        .count = static_cast<int64_t>(values.shape(0)), .cols = static_cast<int64_t>(values.shape(1)), .x = x.data()};
    require(view.count > 0 && view.cols > 0, "no vectors");
    if (exact) return;
    require(view.cols % kBlock == 0, "quantised vectors need a multiple of 32 columns");
    const int64_t blocks = view.cols / kBlock;
    q.resize(x.size());
    scale.resize(static_cast<size_t>(view.count * blocks));
    sum.resize(scale.size());
    for (int64_t v = 0; v < view.count; ++v) {
      kernels.quantize(&x[v * view.cols], view.cols, &q[v * view.cols], &scale[v * blocks], &sum[v * blocks]);
    }
    view.q = q.data();
    view.scale = scale.data();
    view.sum = sum.data();
  }
};

// A matrix packed for the kernels of one instruction set.
class PackedMatrix {
 public:
  PackedMatrix(const Kernels& kernels, int type, int64_t rows, int64_t cols, Array<const uint8_t, 1> source)
      : kernels_(kernels) {
    const auto weight_type = static_cast<WeightType>(type);
    require(rows > 0 && cols > 0 && rows < (1 << 30) && cols < (1 << 30), "impossible sizes");
    const int64_t row_bytes = source_row_bytes(weight_type, cols);
    require(!blocked(weight_type) || cols % kBlock == 0, "blocked types need a multiple of 32 columns");
    require(length(source) == rows * row_bytes, "wrong number of bytes");
    storage_ = Mapping(static_cast<size_t>(kernels.packed_bytes(weight_type, rows, cols)));
    view_ = kernels.layout(weight_type, rows, cols, storage_.data());
    // In two parts, as threads do: `first` must place rows where one call over all would.
    const auto* bytes = reinterpret_cast<const std::byte*>(source.data());
    const int64_t half = rows / 2;
    kernels.pack(view_, storage_.data(), 0, half, bytes);
    kernels.pack(view_, storage_.data(), half, rows, bytes + half * row_bytes);
  }

  int64_t row_bytes() const { return view_.row_bytes(); }

  void dot(const PreparedVectors& x, int64_t first, int64_t last, Array<float, 2> out) const {
    require(x.view.cols == view_.cols, "vectors and matrix differ in columns");
    require(0 <= first && first <= last && last <= view_.rows, "rows outside of the matrix");
    require(static_cast<int64_t>(out.shape(0)) == x.view.count && static_cast<int64_t>(out.shape(1)) == view_.rows,
            "out must be [vectors, rows]");
    kernels_.dot(view_, first, last, x.view, out.data(), view_.rows);
  }

  void dot_listed(const PreparedVectors& x, int64_t v, Indices rows, FloatsOut out) const {
    require(x.view.cols == view_.cols, "vectors and matrix differ in columns");
    require(0 <= v && v < x.view.count, "no such vector");
    check(rows);
    require(out.size() == rows.size(), "out must be [listed rows]");
    kernels_.dot_listed(view_, rows.data(), length(rows), x.view, v, out.data());
  }

  void axpy_listed(Indices rows, Floats coefficient, FloatsOut y) const {
    check(rows);
    require(coefficient.size() == rows.size(), "one coefficient a listed row");
    require(length(y) == view_.cols, "y must be [cols]");
    kernels_.axpy_listed(view_, rows.data(), coefficient.data(), length(rows), y.data());
  }

  void decode_row(int64_t row, FloatsOut out) const {
    require(0 <= row && row < view_.rows, "row outside of the matrix");
    require(length(out) == view_.cols, "out must be [cols]");
    kernels_.decode_row(view_, row, out.data());
  }

 private:
  void check(const Indices& rows) const {
    for (size_t i = 0; i < rows.size(); ++i) {
      require(0 <= rows.data()[i] && rows.data()[i] < view_.rows, "row outside of the matrix");
      require(i == 0 || rows.data()[i - 1] < rows.data()[i], "rows must ascend");
    }
  }

  const Kernels& kernels_;
  Mapping storage_;
  Matrix view_;
};

void bind_matrix(nb::module_& m) {
  nb::class_<PreparedVectors>(m, "Vectors")
      .def(
          "__init__",
          [](PreparedVectors* self, const std::string& isa, Array<const float, 2> x, bool exact) {
            new (self) PreparedVectors(table(isa), x, exact);
          },
          "isa"_a, "x"_a, "exact"_a = false);
  nb::class_<PackedMatrix>(m, "Matrix")
      .def(
          "__init__",
          [](PackedMatrix* self, const std::string& isa, int type, int64_t rows, int64_t cols,
             Array<const uint8_t, 1> source) { new (self) PackedMatrix(table(isa), type, rows, cols, source); },
          "isa"_a, "type"_a, "rows"_a, "cols"_a, "source"_a)
      .def_prop_ro("row_bytes", &PackedMatrix::row_bytes)
      .def("dot", &PackedMatrix::dot, "x"_a, "first"_a, "last"_a, "out"_a)
      .def("dot_listed", &PackedMatrix::dot_listed, "x"_a, "v"_a, "rows"_a, "out"_a)
      .def("axpy_listed", &PackedMatrix::axpy_listed, "rows"_a, "coefficient"_a, "y"_a)
      .def("decode_row", &PackedMatrix::decode_row, "row"_a, "out"_a);
}

void quantize(const std::string& isa, Floats x, Array<int8_t, 1> q, FloatsOut scale, Array<int32_t, 1> sum) {
  const int64_t n = length(x);
  require(n % kBlock == 0 && length(q) == n, "q must be [n], n a multiple of 32");
  require(length(scale) == n / kBlock && length(sum) == n / kBlock, "scale and sum must be [n / 32]");
  table(isa).quantize(x.data(), n, q.data(), scale.data(), sum.data());
}

int64_t positive(const std::string& isa, Floats x, Array<int32_t, 1> out) {
  require(out.size() == x.size(), "out must be as long as x");
  return table(isa).positive(x.data(), length(x), out.data());
}

void rms_norm(const std::string& isa, Floats x, Floats weight, float eps, FloatsOut out) {
  require(x.size() == weight.size() && x.size() == out.size(), "arrays differ in length");
  table(isa).rms_norm(x.data(), weight.data(), length(x), eps, out.data());
}

template <auto kMember>
void gated(const std::string& isa, Floats gate, Floats up, FloatsOut h) {
  require(gate.size() == up.size() && gate.size() == h.size(), "arrays differ in length");
  (table(isa).*kMember)(gate.data(), up.data(), length(gate), h.data());
}

template <auto kMember, class Values>
float cached_dot(const std::string& isa, Floats a, Values b) {
  require(a.size() == b.size(), "arrays differ in length");
  return (table(isa).*kMember)(a.data(), b.data(), length(a));
}

template <auto kMember, class Values>
void cached_axpy(const std::string& isa, float a, Values x, FloatsOut y) {
  require(x.size() == y.size(), "arrays differ in length");
  (table(isa).*kMember)(a, x.data(), y.data(), length(x));
}

void to_f16(const std::string& isa, Floats x, Array<uint16_t, 1> out) {
  require(out.size() == x.size(), "out must be as long as x");
  table(isa).to_f16(x.data(), out.data(), length(x));
}

float exp_sum(const std::string& isa, FloatsOut x, float max) { return table(isa).exp_sum(x.data(), length(x), max); }

void bind_elementwise(nb::module_& m) {
  m.def("quantize", &quantize, "isa"_a, "x"_a, "q"_a, "scale"_a, "sum"_a);
  m.def("positive", &positive, "isa"_a, "x"_a, "out"_a);
  m.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("swiglu", &gated<&Kernels::swiglu>, "isa"_a, "gate"_a, "up"_a, "h"_a);
  m.def("geglu", &gated<&Kernels::geglu>, "isa"_a, "gate"_a, "up"_a, "h"_a);
  m.def("dot_f32", &cached_dot<&Kernels::dot_f32, Floats>, "isa"_a, "a"_a, "b"_a);
  m.def("dot_f16", &cached_dot<&Kernels::dot_f16, Halves>, "isa"_a, "a"_a, "b"_a);
  m.def("axpy_f32", &cached_axpy<&Kernels::axpy_f32, Floats>, "isa"_a, "a"_a, "x"_a, "y"_a);
  m.def("axpy_f16", &cached_axpy<&Kernels::axpy_f16, Halves>, "isa"_a, "a"_a, "x"_a, "y"_a);
  m.def("to_f16", &to_f16, "isa"_a, "x"_a, "out"_a);
  m.def("exp_sum", &exp_sum, "isa"_a, "x"_a, "max"_a);
}

}  // namespace
}  // namespace turbosparse

void bind_kernels(nb::module_& m) {
  nb::module_ kernels = m.def_submodule("kernels", "The kernels one by one, for tests and benchmarks.");
  kernels.def("isas", &turbosparse::isas);
  turbosparse::bind_matrix(kernels);
  turbosparse::bind_elementwise(kernels);
}
