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

void compare(const Kernels& k, const Kernels& g, WeightType type, int64_t rows, int64_t cols, bool int8) {
  const auto source = random_rows(type, rows, cols);
  const Packed ours(k, type, rows, cols, source), theirs(g, type, rows, cols, source);
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
    std::vector<int32_t> listed;
    for (int32_t r = 0; r < rows; r += 1 + r % 3) listed.push_back(r);
    std::vector<float> some(listed.size());
    k.dot_listed(ours.view, listed.data(), static_cast<int64_t>(listed.size()), a.view, 3, some.data());
    for (size_t i = 0; i < listed.size(); ++i) {  // the same bits as in the range, as one of several vectors
      if (std::memcmp(&some[i], &out[3 * rows + listed[i]], 4) != 0) ++failures, std::printf("dot_listed differs\n");
    }
  }
  std::vector<int32_t> every(rows);
  for (int64_t r = 0; r < rows; ++r) every[r] = static_cast<int32_t>(r);
  const auto coefficient = normal(rows);
  auto y = normal(cols), z = y;
  k.axpy_listed(ours.view, every.data(), coefficient.data(), rows, y.data());
  g.axpy_listed(theirs.view, every.data(), coefficient.data(), rows, z.data());
  expect_near("axpy_listed", y, z, 1e-5);
  if (ours.view.largest) {
    const auto coefficients = normal(count * rows);
    std::vector<float> sums(count * cols), expected(count * cols), listed(cols);
    k.sum_rows(ours.view, 0, rows, coefficients.data(), rows, count, sums.data(), cols);
    g.sum_rows(theirs.view, 0, rows, coefficients.data(), rows, count, expected.data(), cols);
    expect_near("sum_rows", sums, expected, 0);
    k.sum_listed(ours.view, every.data(), coefficients.data(), rows, rows, listed.data());
    sums.resize(cols);
    expect_near("sum_listed", listed, sums, 0);
  }
  std::vector<float> row(cols), same(cols);
  k.decode_row(ours.view, rows / 2, row.data());
  g.decode_row(theirs.view, rows / 2, same.data());
  expect_near("decode_row", row, same, 0);
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
      for (const int64_t cols : {32, 64, 96, 160, 576, 992}) {
        for (const int64_t rows : {1, 5, 33}) {
          for (const bool int8 : {false, true}) compare(*tables[i], generic, type, rows, cols, int8);
        }
      }
    }
    for (const WeightType type : {WeightType::f32, WeightType::f16, WeightType::bf16}) {
      for (const int64_t cols : {1, 3, 7, 16, 33, 64, 130}) compare(*tables[i], generic, type, 9, cols, false);
    }
    for (const int64_t n : {1, 2, 3, 5, 7, 16, 33, 1023}) compare_elementwise(*tables[i], generic, n);
    std::printf("%s %s\n", tables[i]->isa, failures == before ? "agrees" : "DISAGREES");
  }
  return failures > 0;
}
