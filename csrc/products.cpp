// SPDX-License-Identifier: Apache-2.0
// Products of weights with the rows of a pass.
#include <algorithm>
#include <cstring>

#include "forward.h"
#include "kernels/pack.h"

namespace turbosparse {
namespace {

// left = x - scale * q: what quantisation lost.
void take_quantised_off(const float* x, const int8_t* q, const float* scale, int64_t blocks, float* left) {
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t group = group_size(blocks - begin);
    for (int64_t b = 0; b < group; ++b) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t column = (begin + b) * kBlock + i;
        left[column] = x[column] - scale[begin + b] * q[begin * kBlock + byte_in_group(group, b, i)];
      }
    }
    begin += group;
  }
}

}  // namespace

void Forward::Prepared::resize(int64_t n, int64_t cols) {
  x.resize(n * cols);
  q.resize(n * cols);
  scale.resize(n * (cols / kBlock));
  sum.resize(n * (cols / kBlock));
}

Vectors Forward::Prepared::view(int64_t n, int64_t cols, bool quantized) const {
  Vectors v;
  v.count = n;
  v.cols = cols;
  v.x = x.data();
  if (quantized) {
    v.q = q.data();
    v.scale = scale.data();
    v.sum = sum.data();
  }
  return v;
}

Forward::Inputs Forward::Inputs::of(const Routing::Group& group) const {
  if (values.count == 1) return *this;
  const auto part = [&](Vectors v) {
    const int64_t blocks = v.cols / kBlock;
    v.count = group.n;
    if (v.x) v.x += group.first * v.cols;
    if (v.q) v.q += group.first * v.cols;
    if (v.scale) v.scale += group.first * blocks;
    if (v.sum) v.sum += group.first * blocks;
    return v;
  };
  return Inputs{part(values), rest.count > 0 ? part(rest) : rest};
}

Forward::Inputs Forward::prepare(Member& member, int64_t n, const Matrix& w, const float* source, int64_t stride,
                                 const float* norm, Room room, const int32_t* rows) {
  // A single vector is prepared by every member for itself: cheaper than a barrier.
  const bool alone = n == 1;
  enter(member, Phase::other);
  const int64_t cols = w.cols, blocks = cols / kBlock;
  InputRoom& into = alone ? scratch_[member.rank()].inputs[room] : shared_[room];
  const bool quantized = !model_->exact_fp32() && cols % kBlock == 0;
  const bool fine = quantized && model_->fine_inputs();
  const auto [first, last] = alone ? std::pair<int64_t, int64_t>{0, 1} : member.part(n);
  for (int64_t t = first; t < last; ++t) {
    const float* from = source + (rows ? rows[t] : t) * stride;
    float* x = &into.values.x[t * cols];
    if (norm) {
      kernels_.rms_norm(from, norm, cols, config_.norm_eps, x);
    } else {
      std::memcpy(x, from, cols * sizeof(float));
    }
    if (!quantized) continue;
    Prepared& v = into.values;
    kernels_.quantize(x, cols, &v.q[t * cols], &v.scale[t * blocks], &v.sum[t * blocks]);
    if (fine) quantize_rest(into, t, cols);
  }
  if (!alone) member.barrier();
  return Inputs{into.values.view(n, cols, quantized), into.rest.view(fine ? n : 0, cols, fine)};
}

void Forward::quantize_rest(InputRoom& room, int64_t t, int64_t cols) {
  const int64_t blocks = cols / kBlock;
  Prepared& v = room.values;
  Prepared& rest = room.rest;
  float* left = &rest.x[t * cols];
  take_quantised_off(&v.x[t * cols], &v.q[t * cols], &v.scale[t * blocks], blocks, left);
  kernels_.quantize(left, cols, &rest.q[t * cols], &rest.scale[t * blocks], &rest.sum[t * blocks]);
}

Forward::Inputs Forward::normed(Member& member, int64_t n, const float* weight, const Matrix& w) {
  return prepare(member, n, w, residual_.data(), config_.hidden, weight);
}

void Forward::product(Scratch& scratch, const Matrix& w, int64_t first, int64_t last, const Inputs& x, float* out,
                      int64_t stride) {
  scratch.count_read((last - first) * w.row_bytes);
  kernels_.dot(w, first, last, x.both(), out, stride);
}

void Forward::listed_product(Scratch& scratch, const Matrix& w, int64_t n, const Inputs& x, int64_t vector) {
  kernels_.dot_listed(w, scratch.listed.data(), n, x.both(), vector, scratch.value.data());
}

void Forward::add_to_residual(Member& member, const Pass& pass, const Matrix& w, const Inputs& x,
                              const float* post_norm) {
  const int64_t d = config_.hidden;
  if (post_norm) {
    multiply(member, w, x, update_.data(), d);
    norm_into_residual(member, pass.n, post_norm);
    return;
  }
  multiply(member, w, x, update_.data(), d, [&](int64_t first, int64_t last) {
    for (int64_t t = 0; t < pass.n; ++t) {
      for (int64_t c = first; c < last; ++c) residual_[t * d + c] += update_[t * d + c];
    }
  });
  member.barrier();
}

void Forward::norm_into_residual(Member& member, int64_t n, const float* post_norm) {
  const int64_t d = config_.hidden;
  member.barrier();
  const auto [first, last] = member.part(n);
  for (int64_t t = first; t < last; ++t) {
    float* update = &update_[t * d];
    kernels_.rms_norm(update, post_norm, d, config_.norm_eps, update);
    for (int64_t c = 0; c < d; ++c) residual_[t * d + c] += update[c];
  }
  member.barrier();
}

}  // namespace turbosparse
