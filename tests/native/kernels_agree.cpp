// SPDX-License-Identifier: Apache-2.0
// Every kernel table that this machine can run against the generic one, at odd sizes: for instruction sets that Python
// cannot reach, such as another processor's under an emulator. Prints a line a table; exit code 1 where one disagrees.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/ternary.h"

using namespace turbosparse;

namespace {

std::mt19937 rng(7);

std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> x(n);
  for (float& value : x) value = draw(rng);
  return x;
}

// Rows in ggml's layout: random bytes, with scales around 2^-7 where there are any; halves and floats of moderate size.
std::vector<std::byte> random_rows(WeightType type, int64_t rows, int64_t cols) {
  const bool blocked = type == WeightType::q4_0 || type == WeightType::q8_0;
  const int64_t block = type == WeightType::q4_0 ? 18 : 34;
  const int64_t bytes = blocked ? rows * cols / kBlock * block : rows * cols * (type == WeightType::f32 ? 4 : 2);
  std::vector<std::byte> out(bytes);
  for (std::byte& b : out) b = static_cast<std::byte>(rng());
  const auto half = [&](int64_t at) {
    const auto bits = static_cast<uint16_t>(0x2000u | (rng() & 0x83ffu));
    std::memcpy(&out[at], &bits, 2);
  };
  if (blocked) {
    for (int64_t at = 0; at < bytes; at += block) half(at);
  } else if (type == WeightType::f16) {
    for (int64_t at = 0; at < bytes; at += 2) half(at);
  } else {
    for (int64_t at = type == WeightType::f32 ? 3 : 1; at < bytes; at += type == WeightType::f32 ? 4 : 2) {
      out[at] = std::byte{0x3e} | (out[at] & std::byte{0x80});
    }
  }
  return out;
}

struct Packed {
  std::vector<std::byte> storage;
  std::vector<float> largest;
  Matrix view;

  Packed(const Kernels& k, WeightType type, int64_t rows, int64_t cols, const std::vector<std::byte>& source)
      : storage(k.packed_bytes(type, rows, cols) + 64) {
    const auto start = reinterpret_cast<uintptr_t>(storage.data());
    std::byte* aligned = storage.data() + (64 - start % 64) % 64;
    view = k.layout(type, rows, cols, aligned);
    if (type == WeightType::ternary) {
      pack_ternary(view, aligned, 0, rows, WeightType::q8_0, source.data());
      return;
    }
    k.pack(view, aligned, 0, rows, source.data());
    if (type != WeightType::q4_0 && type != WeightType::q8_0) return;
    largest.resize(rows);
    k.largest_scales(view, 0, rows, largest.data());
    view.largest = largest.data();
  }
};

// Vectors [count, cols] with their int8 blocks.
struct Prepared {
  std::vector<float> x, scale;
  std::vector<int8_t> q;
  std::vector<int32_t> sum;
  Vectors view;

  Prepared(const Kernels& k, std::vector<float> values, int64_t cols, bool int8) : x(std::move(values)) {
    view.count = static_cast<int64_t>(x.size()) / cols;
    view.cols = cols;
    view.x = x.data();
    if (!int8) return;
    q.resize(x.size());
    scale.resize(x.size() / kBlock);
    sum.resize(x.size() / kBlock);
    for (int64_t v = 0; v < view.count; ++v) {
      k.quantize(&x[v * cols], cols, &q[v * cols], &scale[v * cols / kBlock], &sum[v * cols / kBlock]);
    }
    view.q = q.data();
    view.scale = scale.data();
    view.sum = sum.data();
  }
};

int failures = 0;

void expect_near(const char* what, const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  double largest = 1e-6, apart = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(b[i])));
    apart = std::max(apart, std::abs(static_cast<double>(a[i]) - b[i]));
  }
  if (apart <= tolerance * largest && a.size() == b.size()) return;
  ++failures;
  std::printf("%s: %g apart of %g\n", what, apart, largest);
}

void expect_same(const char* what, const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0)) return;
  ++failures;
  std::printf("%s: other bits\n", what);
}

// The same rows for a table and for the generic one.
struct Pair {
  const Kernels &k, &g;
  Packed ours, theirs;
  int64_t rows, cols;

  Pair(const Kernels& k, const Kernels& g, WeightType type, int64_t rows, int64_t cols,
       const std::vector<std::byte>& source)
      : k(k), g(g), ours(k, type, rows, cols, source), theirs(g, type, rows, cols, source), rows(rows), cols(cols) {}
};

// No row, one row, all rows, and rows at random, ascending.
std::vector<std::vector<int32_t>> lists(int64_t rows) {
  std::vector<std::vector<int32_t>> out(4);
  out[1] = {static_cast<int32_t>(rows - 1)};
  for (int32_t r = 0; r < rows; ++r) {
    out[2].push_back(r);
    if (rng() % 5 < 2) out[3].push_back(r);
  }
  return out;
}

void compare_dots(const Pair& pair, bool int8) {
  const auto& [k, g, ours, theirs, rows, cols] = pair;
  const int64_t count = 7;
  const auto x = normal(count * cols), lost = normal(count * cols);
  Prepared a(k, x, cols, int8), b(g, x, cols, int8);
  if (a.q != b.q || a.scale != b.scale || a.sum != b.sum) ++failures, std::printf("quantize differs\n");
  Prepared rest_a(k, lost, cols, int8), rest_b(g, lost, cols, int8);
  for (const bool fine : {false, true}) {
    if (fine && !int8) continue;
    a.view.rest = fine ? &rest_a.view : nullptr;
    b.view.rest = fine ? &rest_b.view : nullptr;
    std::vector<float> out(count * rows), expected(count * rows);
    k.dot(ours.view, 0, rows, a.view, out.data(), rows);
    g.dot(theirs.view, 0, rows, b.view, expected.data(), rows);
    expect_near("dot", out, expected, 1e-5);
    for (const auto& list : lists(rows)) {  // the same bits as in the range, as one of several vectors
      std::vector<float> some(list.size()), same(list.size());
      k.dot_listed(ours.view, list.data(), static_cast<int64_t>(list.size()), a.view, 3, some.data());
      for (size_t i = 0; i < list.size(); ++i) same[i] = out[3 * rows + list[i]];
      expect_same("dot_listed", some, same);
    }
  }
}

void compare_axpys(const Pair& pair) {
  for (const auto& list : lists(pair.rows)) {
    const auto n = static_cast<int64_t>(list.size());
    const auto coefficient = normal(n);
    auto y = normal(pair.cols), z = y;
    pair.k.axpy_listed(pair.ours.view, list.data(), coefficient.data(), n, y.data());
    pair.g.axpy_listed(pair.theirs.view, list.data(), coefficient.data(), n, z.data());
    expect_near("axpy_listed", y, z, 1e-5);
  }
}

// Sums over lists have the generic kernel's bits, and those of sums over all rows where the others' coefficients are 0.
void compare_sums(const Pair& pair, const std::vector<float>& coefficients, int64_t count) {
  const auto& [k, g, ours, theirs, rows, cols] = pair;
  for (const int64_t first : {int64_t{0}, rows / 3}) {
    auto y = normal(count * cols), z = y;
    k.sum_rows(ours.view, first, rows, coefficients.data(), rows, count, y.data(), cols);
    g.sum_rows(theirs.view, first, rows, coefficients.data(), rows, count, z.data(), cols);
    expect_same("sum_rows", y, z);
  }
  for (const auto& list : lists(rows)) {
    const auto n = static_cast<int64_t>(list.size());
    std::vector<float> some, all(rows);
    for (const int32_t r : list) some.push_back(all[r] = coefficients[r]);
    const auto y = normal(cols);
    auto listed = y, generic = y, whole = y;
    k.sum_listed(ours.view, list.data(), some.data(), n, rows, listed.data());
    g.sum_listed(theirs.view, list.data(), some.data(), n, rows, generic.data());
    k.sum_rows(ours.view, 0, rows, all.data(), rows, 1, whole.data(), cols);
    expect_same("sum_listed", listed, generic);
    expect_same("sum_listed beside sum_rows", listed, whole);
  }
}

void compare(const Kernels& k, const Kernels& g, WeightType type, int64_t rows, int64_t cols) {
  const Pair pair(k, g, type, rows, cols, random_rows(type, rows, cols));
  compare_dots(pair, false);
  compare_axpys(pair);
  if (pair.ours.view.largest) {
    compare_dots(pair, true);
    for (const int64_t count : {1, 2, 4, 7}) compare_sums(pair, normal(count * rows), count);
  }
  for (const int64_t r : {int64_t{0}, rows / 2, rows - 1}) {
    std::vector<float> row(cols), same(cols);
    k.decode_row(pair.ours.view, r, row.data());
    g.decode_row(pair.theirs.view, r, same.data());
    expect_same("decode_row", row, same);
  }
}

void compare_ternary(const Kernels& k, const Kernels& g, int64_t rows, int64_t cols) {
  auto source = random_rows(WeightType::q8_0, rows, cols);
  for (int64_t at = 0; at < static_cast<int64_t>(source.size()); ++at) {
    if (at % 34 == 1) source[at] = std::byte{0x21};  // of the scale: one a row
    if (at % 34 == 0) source[at] = static_cast<std::byte>(at / (cols / kBlock * 34));
    if (at % 34 > 1) source[at] = static_cast<std::byte>(static_cast<int>(rng() % 3) * 127 - 127);
  }
  if (!is_ternary(WeightType::q8_0, rows, cols, source.data())) ++failures, std::printf("ternary rows not seen\n");
  compare_dots(Pair(k, g, WeightType::ternary, rows, cols, source), true);
}

// Every quant and every level as large as can be: before the offset is taken back, sums leave int32.
void compare_largest_sums(const Kernels& k, const Kernels& g, WeightType type, int64_t rows) {
  const int64_t cols = 96;
  for (const auto byte : {std::byte{0}, std::byte{0x7f}, std::byte{0x80}, std::byte{0xff}}) {
    auto source = random_rows(type, rows, cols);
    const size_t block = type == WeightType::q4_0 ? 18 : 34;
    for (size_t at = 0; at < source.size(); ++at) source[at] = at % block < 2 ? std::byte{0x20} : byte;
    const Pair pair(k, g, type, rows, cols, source);
    for (const float sign : {1.0f, -1.0f}) compare_sums(pair, std::vector<float>(rows, sign), 1);
  }
}

// One coefficient that is no finite number, or too large, and coefficients that are all zero or nearly.
void compare_odd_coefficients(const Kernels& k, const Kernels& g, WeightType type) {
  const int64_t rows = 9, cols = 160;
  const Pair pair(k, g, type, rows, cols, random_rows(type, rows, cols));
  compare_sums(pair, std::vector<float>(rows), 1);
  compare_sums(pair, std::vector<float>(rows, 0x1p-120f), 1);
  for (const float odd : {NAN, INFINITY, -INFINITY}) {
    auto coefficient = normal(rows);
    coefficient[4] = odd;
    std::vector<float> y(cols), z(cols);
    k.sum_rows(pair.ours.view, 0, rows, coefficient.data(), rows, 1, y.data(), cols);
    g.sum_rows(pair.theirs.view, 0, rows, coefficient.data(), rows, 1, z.data(), cols);
    for (int64_t c = 0; c < cols; ++c) {
      if (std::isfinite(y[c]) || std::isnan(y[c]) != std::isnan(z[c])) ++failures, std::printf("a lost %g\n", odd);
    }
  }
}

void compare_elementwise(const Kernels& k, const Kernels& g, int64_t n) {
  const auto a = normal(n), b = normal(n);
  std::vector<float> out(n), expected(n);
  k.rms_norm(a.data(), b.data(), n, 1e-5f, out.data());
  g.rms_norm(a.data(), b.data(), n, 1e-5f, expected.data());
  expect_near("rms_norm", out, expected, 1e-5);
  k.swiglu(a.data(), b.data(), n, out.data());
  g.swiglu(a.data(), b.data(), n, expected.data());
  expect_near("swiglu", out, expected, 1e-5);
  k.geglu(a.data(), b.data(), n, out.data());
  g.geglu(a.data(), b.data(), n, expected.data());
  expect_near("geglu", out, expected, 1e-5);
  out = expected = a;
  const float top = g.maximum(a.data(), n);
  if (k.maximum(a.data(), n) != top) ++failures, std::printf("maximum differs\n");
  const float sums[2] = {k.exp_sum(out.data(), n, top), g.exp_sum(expected.data(), n, top)};
  expect_near("exp_sum", {sums[0]}, {sums[1]}, 1e-5);
  expect_near("exp_sum's terms", out, expected, 1e-6);
  std::vector<int32_t> places(n + 16), same(n + 16);
  const int64_t found = k.positive(a.data(), n, places.data());
  places.resize(found);
  same.resize(g.positive(a.data(), n, same.data()));
  if (places != same) ++failures, std::printf("positive differs\n");
  std::vector<uint16_t> halves(n), same_halves(n);
  k.to_f16(a.data(), halves.data(), n);
  g.to_f16(a.data(), same_halves.data(), n);
  if (halves != same_halves) ++failures, std::printf("to_f16 differs\n");
}

}  // namespace

int main() {
  int count = 0;
  const Kernels* const* tables = available_kernels(&count);
  const Kernels& generic = *tables[count - 1];
  for (int i = 0; i < count; ++i) {
    const int before = failures;
    for (const WeightType type : {WeightType::q4_0, WeightType::q8_0}) {
      for (const int64_t cols : {32, 64, 96, 160, 576, 992, 4128}) {  // the last is more than a tile of sums
        for (const int64_t rows : {1, 2, 5, 33, 71}) compare(*tables[i], generic, type, rows, cols);
      }
      for (const int64_t rows : {1, 448, 896, 7168}) compare_largest_sums(*tables[i], generic, type, rows);
      compare_odd_coefficients(*tables[i], generic, type);
    }
    for (const int64_t cols : {32, 64, 96, 160, 576, 992, 4128}) {
      for (const int64_t rows : {1, 5, 33}) compare_ternary(*tables[i], generic, rows, cols);
    }
    for (const WeightType type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
      for (const int64_t cols : {1, 3, 7, 16, 33, 64, 130}) compare(*tables[i], generic, type, 9, cols);
    }
    for (const int64_t n : {1, 2, 3, 5, 7, 16, 33, 1023}) compare_elementwise(*tables[i], generic, n);
    std::printf("%s %s\n", tables[i]->isa, failures == before ? "agrees" : "DISAGREES");
  }
  return failures > 0;
}
