// SPDX-License-Identifier: Apache-2.0
// The kernels of every instruction set on numpy arrays, for tests and benchmarks (`turbosparse._native.kernels`). All
// sizes and indices are checked here, so that a wrong call is a Python exception.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/ternary.h"
#include "memory.h"
#include "sketch.h"
#include "team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace turbosparse {
namespace {

template <class T, int kDims>
using In = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <class T>
using InOut = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<nb::numpy, T>;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

const Kernels& kernels_of(const std::string& isa) {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (isa == tables[i]->isa) return *tables[i];
  }
  throw std::invalid_argument("this machine cannot run the instruction set '" + isa + "'");
}

std::vector<std::string> available() {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->isa);
  return names;
}

// A numpy array that owns `data`.
template <class T>
Out<T> array(std::unique_ptr<T[]> data, std::initializer_list<size_t> shape) {
  T* values = data.release();
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Out<T>(values, shape, owner);
}

struct PackedMatrix {
  const Kernels& kernels;
  Mapping storage;  // as the engine holds weights: pages decide what scattered rows cost
  std::vector<float> largest;
  Matrix view;

  PackedMatrix(const std::string& isa, int type, int64_t rows, int64_t cols, In<uint8_t, 1> source, bool ternary)
      : kernels(kernels_of(isa)) {
    const auto weight = static_cast<WeightType>(type);
    const bool blocked = weight == WeightType::q4_0 || weight == WeightType::q8_0;
    require(blocked || weight == WeightType::f32 || weight == WeightType::f16 || weight == WeightType::bf16,
            "no kernels for this ggml type");
    require(rows >= 0 && cols > 0 && rows < (1 << 30) && cols < (1 << 30), "rows or columns out of range");
    require(!blocked || cols % kBlock == 0, "columns of a blocked type must be a multiple of 32");
    const auto* bytes_of_rows = reinterpret_cast<const std::byte*>(source.data());
    require(static_cast<int64_t>(source.size()) == rows * kernels.layout(weight, rows, cols, nullptr).row_bytes,
            "source has the wrong number of bytes");
    require(!ternary || (blocked && is_ternary(weight, rows, cols, bytes_of_rows)), "rows are not ternary");
    const WeightType packed = ternary ? WeightType::ternary : weight;
    storage = Mapping(static_cast<size_t>(kernels.packed_bytes(packed, rows, cols)));
    view = kernels.layout(packed, rows, cols, storage.data());
    if (ternary) {
      pack_ternary(view, storage.data(), 0, rows, weight, bytes_of_rows);
      return;
    }
    kernels.pack(view, storage.data(), 0, rows, bytes_of_rows);
    if (!blocked) return;
    largest.resize(static_cast<size_t>(rows));
    kernels.largest_scales(view, 0, rows, largest.data());
    view.largest = largest.data();
  }

  void check_not_ternary() const {
    require(view.type != WeightType::ternary, "ternary rows multiply int8 vectors, nothing else");
  }

  void check_fits(const Vectors& x) const {
    require(x.cols == view.cols, "matrix and vectors differ in columns");
    if (!x.q) check_not_ternary();
  }

  void check_rows(In<int32_t, 1> rows) const {
    for (size_t i = 0; i < rows.size(); ++i) {
      require(rows.data()[i] >= 0 && rows.data()[i] < view.rows, "a listed row is out of range");
    }
  }
};

// Vectors as the engine hands them to the kernels; keeps what it points to.
struct PreparedVectors {
  // One term of int8 blocks.
  struct Term {
    In<float, 2> x;
    std::vector<int8_t> q;
    std::vector<float> scale;
    std::vector<int32_t> sum;
    Vectors view;

    Term(const Kernels& kernels, In<float, 2> values, bool int8) : x(values) {
      const auto count = static_cast<int64_t>(x.shape(0));
      const auto cols = static_cast<int64_t>(x.shape(1));
      view = Vectors{.count = count, .cols = cols, .x = x.data()};
      if (!int8) return;
      require(cols % kBlock == 0, "int8 vectors need a multiple of 32 columns");
      const int64_t blocks = cols / kBlock;
      q.resize(static_cast<size_t>(count * cols));
      scale.resize(static_cast<size_t>(count * blocks));
      sum.resize(static_cast<size_t>(count * blocks));
      for (int64_t v = 0; v < count; ++v) {
        kernels.quantize(x.data() + v * cols, cols, q.data() + v * cols, scale.data() + v * blocks,
                         sum.data() + v * blocks);
      }
      view.q = q.data();
      view.scale = scale.data();
      view.sum = sum.data();
    }
  };
  Term first;
  std::optional<Term> rest;
  Vectors view;

  PreparedVectors(const std::string& isa, In<float, 2> values, bool int8, std::optional<In<float, 2>> second)
      : first(kernels_of(isa), values, int8), view(first.view) {
    if (!second) return;
    require(int8, "a second term is for int8 vectors");
    require(second->shape(0) == values.shape(0) && second->shape(1) == values.shape(1), "the terms differ in shape");
    rest.emplace(kernels_of(isa), *second, true);
    view.rest = &rest->view;
  }
  PreparedVectors(const PreparedVectors&) = delete;
  PreparedVectors& operator=(const PreparedVectors&) = delete;
};

struct SketchOf {
  const PackedMatrix& of;
  Team team{1};
  Sketch sketch;

  SketchOf(const PackedMatrix& w, const std::vector<double>& squares)
      : of(w), sketch((check(w, squares), w.kernels), w.view, squares, team) {}
  static void check(const PackedMatrix& w, const std::vector<double>& squares) {
    require(Sketch::pays(w.kernels, w.view), "a sketch of this matrix saves nothing");
    require(static_cast<int64_t>(squares.size()) == w.view.cols, "one square a column");
  }
  void check_fits(const PreparedVectors& x) const {
    require(x.view.cols == of.view.cols && x.view.count == 1 && x.view.q, "one int8 vector of the matrix's columns");
  }
  float length(const PreparedVectors& x) const {
    check_fits(x);
    return sketch.length(x.view);
  }
  Out<float> dot(const PreparedVectors& x) const {
    check_fits(x);
    const auto rows = static_cast<size_t>(of.view.rows);
    auto out = std::make_unique<float[]>(rows);
    of.kernels.dot(sketch.matrix(), 0, of.view.rows, x.view, out.get(), of.view.rows);
    return array(std::move(out), {rows});
  }
  Out<float> bounds() const {
    const auto rows = static_cast<size_t>(of.view.rows);
    auto out = std::make_unique<float[]>(rows);
    std::copy_n(sketch.bounds(), rows, out.get());
    return array(std::move(out), {rows});
  }
};

Out<float> dot(const PackedMatrix& w, const PreparedVectors& x, int64_t first, int64_t last) {
  w.check_fits(x.view);
  require(0 <= first && first <= last && last <= w.view.rows, "row range out of bounds");
  const auto rows = static_cast<size_t>(last - first);
  const auto count = static_cast<size_t>(x.view.count);
  auto out = std::make_unique<float[]>(rows * count);
  {
    nb::gil_scoped_release release;
    // The kernel indexes rows of the matrix; a view that begins at `first` makes its output begin there too.
    Matrix view = w.view;
    view.values += first * view.row_bytes;
    view.rows = last - first;
    w.kernels.dot(view, 0, last - first, x.view, out.get(), last - first);
  }
  return array(std::move(out), {count, rows});
}

Out<float> dot_listed(const PackedMatrix& w, In<int32_t, 1> rows, const PreparedVectors& x, int64_t v) {
  w.check_fits(x.view);
  require(0 <= v && v < x.view.count, "vector out of range");
  w.check_rows(rows);
  auto out = std::make_unique<float[]>(rows.size());
  {
    nb::gil_scoped_release release;
    w.kernels.dot_listed(w.view, rows.data(), static_cast<int64_t>(rows.size()), x.view, v, out.get());
  }
  return array(std::move(out), {rows.size()});
}

void axpy_listed(const PackedMatrix& w, In<int32_t, 1> rows, In<float, 1> coefficient, InOut<float> y) {
  require(static_cast<int64_t>(y.size()) == w.view.cols, "y and matrix differ in columns");
  require(coefficient.size() == rows.size(), "one coefficient a listed row");
  w.check_not_ternary();
  w.check_rows(rows);
  nb::gil_scoped_release release;
  w.kernels.axpy_listed(w.view, rows.data(), coefficient.data(), static_cast<int64_t>(rows.size()), y.data());
}

void sum_listed(const PackedMatrix& w, In<int32_t, 1> rows, In<float, 1> coefficient, int64_t most, InOut<float> y) {
  require(w.view.largest != nullptr, "sums in integers are for blocked types");
  require(static_cast<int64_t>(y.size()) == w.view.cols, "y and matrix differ in columns");
  require(coefficient.size() == rows.size(), "one coefficient a listed row");
  require(static_cast<int64_t>(rows.size()) <= most, "more rows than there may be");
  w.check_rows(rows);
  nb::gil_scoped_release release;
  w.kernels.sum_listed(w.view, rows.data(), coefficient.data(), static_cast<int64_t>(rows.size()), most, y.data());
}

Out<float> sum_rows(const PackedMatrix& w, int64_t first, int64_t last, In<float, 2> coefficient) {
  require(w.view.largest != nullptr, "sums in integers are for blocked types");
  require(0 <= first && first <= last && last <= w.view.rows, "row range out of bounds");
  require(static_cast<int64_t>(coefficient.shape(1)) == last - first, "one coefficient a row");
  const size_t count = coefficient.shape(0), cols = static_cast<size_t>(w.view.cols);
  auto out = std::make_unique<float[]>(count * cols);
  {
    nb::gil_scoped_release release;
    w.kernels.sum_rows(w.view, first, last, coefficient.data(), last - first, static_cast<int64_t>(count), out.get(),
                       w.view.cols);
  }
  return array(std::move(out), {count, cols});
}

Out<float> decode_row(const PackedMatrix& w, int64_t row) {
  require(0 <= row && row < w.view.rows, "row out of range");
  w.check_not_ternary();
  const auto cols = static_cast<size_t>(w.view.cols);
  auto out = std::make_unique<float[]>(cols);
  w.kernels.decode_row(w.view, row, out.get());
  return array(std::move(out), {cols});
}

nb::tuple quantize(const std::string& isa, In<float, 1> x) {
  require(x.size() % kBlock == 0, "int8 vectors need a multiple of 32 columns");
  const size_t blocks = x.size() / kBlock;
  auto q = std::make_unique<int8_t[]>(x.size());
  auto scale = std::make_unique<float[]>(blocks);
  auto sum = std::make_unique<int32_t[]>(blocks);
  kernels_of(isa).quantize(x.data(), static_cast<int64_t>(x.size()), q.get(), scale.get(), sum.get());
  return nb::make_tuple(array(std::move(q), {x.size()}), array(std::move(scale), {blocks}),
                        array(std::move(sum), {blocks}));
}

Out<int32_t> positive(const std::string& isa, In<float, 1> x) {
  auto out = std::make_unique<int32_t[]>(x.size());
  const int64_t count = kernels_of(isa).positive(x.data(), static_cast<int64_t>(x.size()), out.get());
  return array(std::move(out), {static_cast<size_t>(count)});
}

float exp_sum(const std::string& isa, InOut<float> x, float max) {
  return kernels_of(isa).exp_sum(x.data(), static_cast<int64_t>(x.size()), max);
}

Out<float> rms_norm(const std::string& isa, In<float, 1> x, In<float, 1> weight, float eps) {
  require(x.size() == weight.size(), "x and weight differ in length");
  auto out = std::make_unique<float[]>(x.size());
  kernels_of(isa).rms_norm(x.data(), weight.data(), static_cast<int64_t>(x.size()), eps, out.get());
  return array(std::move(out), {x.size()});
}

Out<float> gated(const std::string& isa, bool gelu, In<float, 1> gate, In<float, 1> up) {
  require(gate.size() == up.size(), "gate and up differ in length");
  auto out = std::make_unique<float[]>(gate.size());
  const Kernels& kernels = kernels_of(isa);
  (gelu ? kernels.geglu : kernels.swiglu)(gate.data(), up.data(), static_cast<int64_t>(gate.size()), out.get());
  return array(std::move(out), {gate.size()});
}

Out<uint16_t> to_f16(const std::string& isa, In<float, 1> x) {
  auto out = std::make_unique<uint16_t[]>(x.size());
  kernels_of(isa).to_f16(x.data(), out.get(), static_cast<int64_t>(x.size()));
  return array(std::move(out), {x.size()});
}

void bind_attention(nb::module_& m) { m.def("to_f16", to_f16, "isa"_a, "x"_a); }

void bind(nb::module_& module) {
  nb::module_ m = module.def_submodule("kernels", "The kernels of every instruction set, for tests and benchmarks.");
  m.def("available", available, "Instruction sets that this machine can run, best first.");
  nb::class_<PackedMatrix>(m, "Matrix")
      .def(nb::init<const std::string&, int, int64_t, int64_t, In<uint8_t, 1>, bool>(), "isa"_a, "type"_a, "rows"_a,
           "cols"_a, "source"_a, "ternary"_a = false)
      .def_prop_ro("row_bytes", [](const PackedMatrix& w) { return w.view.row_bytes; })
      .def_prop_ro("rows", [](const PackedMatrix& w) { return w.view.rows; })
      .def_prop_ro("cols", [](const PackedMatrix& w) { return w.view.cols; })
      .def("dot", dot, "x"_a, "first"_a, "last"_a)
      .def("dot_listed", dot_listed, "rows"_a, "x"_a, "v"_a)
      .def("axpy_listed", axpy_listed, "rows"_a, "coefficient"_a, "y"_a)
      .def("sum_listed", sum_listed, "rows"_a, "coefficient"_a, "most"_a, "y"_a)
      .def("sum_rows", sum_rows, "first"_a, "last"_a, "coefficient"_a)
      .def("decode_row", decode_row, "row"_a);
  nb::class_<PreparedVectors>(m, "Vectors")
      .def(nb::init<const std::string&, In<float, 2>, bool, std::optional<In<float, 2>>>(), "isa"_a, "x"_a, "int8"_a,
           "rest"_a = nb::none());
  nb::class_<SketchOf>(m, "Sketch")
      .def(nb::init<const PackedMatrix&, const std::vector<double>&>(), "of"_a, "squares"_a, nb::keep_alive<1, 2>())
      .def("dot", &SketchOf::dot, "x"_a)
      .def("length", &SketchOf::length, "x"_a)
      .def("bounds", &SketchOf::bounds)
      .def_prop_ro("largest", [](const SketchOf& s) { return s.sketch.largest(); });
  m.def("quantize", quantize, "isa"_a, "x"_a);
  m.def("positive", positive, "isa"_a, "x"_a);
  m.def(
      "maximum",
      [](const std::string& isa, In<float, 1> x) {
        return kernels_of(isa).maximum(x.data(), static_cast<int64_t>(x.size()));
      },
      "isa"_a, "x"_a);
  m.def("exp_sum", exp_sum, "isa"_a, "x"_a, "max"_a);
  m.def("rms_norm", rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a);
  m.def("swiglu",
        [](const std::string& isa, In<float, 1> gate, In<float, 1> up) { return gated(isa, false, gate, up); });
  m.def("geglu", [](const std::string& isa, In<float, 1> gate, In<float, 1> up) { return gated(isa, true, gate, up); });
  bind_attention(m);
}

}  // namespace
}  // namespace turbosparse

void bind_kernels(nb::module_& module) { turbosparse::bind(module); }
