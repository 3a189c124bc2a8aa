// SPDX-License-Identifier: Apache-2.0
// The one table of kernels: what the engine asks of an instruction set, and all it knows about it.
//
// Every function gives, for one output element, the same bits whatever else is computed in the same call: the order of
// summation of a row depends on the instruction set and on the row alone. So results do not depend on how rows are
// split over threads, on how many vectors are multiplied at once, or on whether rows come as a range or as a list.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbosparse {

// The numbers are ggml's, so that a GGUF type converts by a cast. `ternary` is no type of a file: it is what rows of
// q4_0 or q8_0 become that hold -s, 0 and s alone, one s a row (ternary.h). It multiplies int8 vectors, nothing else.
enum class WeightType : int { f32 = 0, f16 = 1, q4_0 = 2, q8_0 = 8, bf16 = 30, ternary = 1000 };

// Quantised types hold blocks of 32 consecutive columns, which share a scale.
inline constexpr int64_t kBlock = 32;

// A weight matrix [rows, cols] in the layout that kernels of `isa` read, made by Kernels::pack. A row is one run of
// bytes: a neuron can be skipped, and rows in order are one stream, which is what memory serves fastest.
struct Matrix {
  WeightType type = WeightType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  const std::byte* values = nullptr;  // row r begins at values + r * row_bytes
  int64_t row_bytes = 0;              // what reading a row costs
  const float* largest = nullptr;     // [rows], largest |scale| of a row's blocks; null where nobody sums its rows
};

// Vectors [count, cols] (the activations), prepared once for all matrices that multiply them. `q` is null where
// everything is computed in fp32 (`--compute f32`); types without blocks read `x` in either case. `rest`, if not null,
// is what the int8 blocks lost, as int8 blocks again: then x = q * scale + rest to some 15 bits, and both terms are
// multiplied in one pass over the weights, one by one or put together to 16 bits.
struct Vectors {
  int64_t count = 0;
  int64_t cols = 0;
  const float* x = nullptr;      // [count, cols]
  const int8_t* q = nullptr;     // [count, cols]      x = q * scale, symmetric, one scale a block of 32; made by
                                 // Kernels::quantize, in the kernels' own order of columns (pack.h)
  const float* scale = nullptr;  // [count, cols / 32]
  const int32_t* sum = nullptr;  // [count, cols / 32]  sum of q over the block: undoes the weights' offset
  const Vectors* rest = nullptr;
};

struct Kernels {
  const char* isa;  // "generic", "avx2", "avx512"

  // Bytes that a packed matrix takes, and the packing itself: `source` is rows in ggml's own block layout (the bytes of
  // a GGUF tensor), rows `first` to `last` of the matrix; `storage` is 64-byte aligned. layout() gives the view of
  // storage.
  int64_t (*packed_bytes)(WeightType type, int64_t rows, int64_t cols);
  Matrix (*layout)(WeightType type, int64_t rows, int64_t cols, const std::byte* storage);
  void (*pack)(const Matrix& into, std::byte* storage, int64_t first, int64_t last, const std::byte* source);

  // out[r] = largest |scale| of the blocks of row r for r in [first, last), of a packed blocked matrix.
  void (*largest_scales)(const Matrix& w, int64_t first, int64_t last, float* out);

  // x [n] to q [n], scale [n / 32], sum [n / 32]; n is a multiple of 32. One call prepares one whole vector: the order
  // of q depends on n. A block that holds a NaN or an infinity gets a NaN scale, so that it shows in every product.
  void (*quantize)(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum);

  // out[v * out_stride + r] = <row r of w, vector v> for r in [first, last) and every vector.
  void (*dot)(const Matrix& w, int64_t first, int64_t last, const Vectors& x, float* out, int64_t out_stride);

  // out[i] = <row rows[i] of w, vector v> for i < n; rows ascend. Prefetches the next listed row.
  void (*dot_listed)(const Matrix& w, const int32_t* rows, int64_t n, const Vectors& x, int64_t v, float* out);

  // y[c] += coefficient[i] * w[rows[i], c] for i = 0 .. n - 1 in that order, in fp32; y [cols].
  void (*axpy_listed)(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, float* y);

  // The same in integers, for blocked types with w.largest: coefficients times scales keep some 15 bits of the largest
  // of them (sums.h). n <= most, which the bits depend on, but not on the order of the rows, nor on rows whose
  // coefficient is zero.
  void (*sum_listed)(const Matrix& w, const int32_t* rows, const float* coefficient, int64_t n, int64_t most, float* y);

  // y[v * y_stride + c] += coefficient[v * stride + r - first] * w[r, c] for v < count, over rows [first, last): for
  // each v the bits of sum_listed with all these rows and most = last - first.
  void (*sum_rows)(const Matrix& w, int64_t first, int64_t last, const float* coefficient, int64_t stride,
                   int64_t count, float* y, int64_t y_stride);

  // One row of w as fp32, exactly what its type says: out [cols] (the embedding look-up).
  void (*decode_row)(const Matrix& w, int64_t row, float* out);

  // out[i] = index of the i-th x > 0, ascending; returns how many. x [n], out [n].
  int64_t (*positive)(const float* x, int64_t n, int32_t* out);

  // Keys and values on their way into the cache, round to nearest even; x, out [n].
  void (*to_f16)(const float* x, uint16_t* out, int64_t n);

  // In place: x[i] = exp(x[i] - max) ; returns the sum. fp32 accuracy of 2 ulp in exp.
  float (*exp_sum)(float* x, int64_t n, float max);
  // The largest x, -inf for n = 0; numbers only.
  float (*maximum)(const float* x, int64_t n);
  // Root mean square norm: out = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  // h = silu(gate) * up and gelu_tanh(gate) * up; in place in gate is allowed.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* h);
  void (*geglu)(const float* gate, const float* up, int64_t n, float* h);
};

// Tables that this machine can run, best first; the list always ends with generic.
const Kernels* const* available_kernels(int* count);

}  // namespace turbosparse
