// SPDX-License-Identifier: Apache-2.0
#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace turbosparse {
namespace {

constexpr int64_t kWidest = 1024;  // of a head; config.py bounds it too

// n columns as blocks of ggml's q8_0: a float16 scale, then 32 bytes.
void to_q8_0(const Kernels& kernels, const float* x, int64_t n, std::byte* out) {
  for (int64_t block = 0; block < n; block += kBlock, out += 2 + kBlock) {
    float largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) largest = std::fmax(largest, std::fabs(x[block + i]));
    bool numbers = std::isfinite(largest);
    for (int64_t i = 0; i < kBlock; ++i) numbers &= !std::isnan(x[block + i]);
    const float scale = numbers ? largest / 127.0f : NAN;  // what is no number shows in every product
    const float inverse = numbers && largest >= 0x1p-100f ? 127.0f / largest : 0;
    uint16_t half;
    kernels.to_f16(&scale, &half, 1);
    std::memcpy(out, &half, 2);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float level = inverse == 0 ? 0 : std::nearbyint(x[block + i] * inverse);
      out[2 + i] = static_cast<std::byte>(static_cast<int8_t>(level));
    }
  }
}

}  // namespace

KvCache::KvCache(const Config& config, const Kernels& kernels, WeightType type, int64_t context, int64_t ahead)
    : kernels_(kernels),
      type_(type),
      heads_(config.kv_heads),
      width_(config.head_dim),
      context_(context),
      ahead_(ahead) {
  if (type != WeightType::f32 && type != WeightType::f16 && type != WeightType::q8_0) {
    throw std::invalid_argument("the cache holds f32, f16 or q8_0");
  }
  if (type == WeightType::q8_0 && width_ % kBlock != 0) {
    throw std::invalid_argument("a cache of q8_0 needs heads that are whole blocks of 32");
  }
  if (width_ > kWidest) throw std::invalid_argument("impossible sizes");
  int64_t bytes = 0;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const int64_t reach = config.slides(layer) ? config.sliding_window + ahead - 1 : context;
    cells_.push_back(std::min(context, reach));
    bytes += 2 * heads_ * kernels.packed_bytes(type, cells_.back(), width_);
  }
  memory_ = Mapping(static_cast<size_t>(bytes), false);
  std::byte* storage = memory_.data();
  for (const int64_t cells : cells_) {
    for (int64_t i = 0; i < 2 * heads_; ++i) {
      parts_.push_back({kernels.layout(type, cells, width_, storage), storage});
      storage += kernels.packed_bytes(type, cells, width_);
    }
  }
}

// A ring of window + ahead - 1 cells has lost what lies more than that before the furthest position: a token whose
// window ends at most `ahead` before it finds everything.
bool KvCache::holds_until(int64_t position, int64_t furthest) const {
  const bool whole =
      std::all_of(cells_.begin(), cells_.end(), [&](int64_t cells) { return cells == context_ || furthest <= cells; });
  return whole || furthest - position <= ahead_;
}

void KvCache::store(int64_t layer, int64_t head, int64_t which, int64_t position, const float* x) {
  const Part& into = parts_[part(layer, head, which)];
  const int64_t cell = position % cells_[layer];
  std::byte row[kWidest * sizeof(float)];
  const std::byte* source = row;
  if (type_ == WeightType::f32) {
    source = reinterpret_cast<const std::byte*>(x);
  } else if (type_ == WeightType::f16) {
    kernels_.to_f16(x, reinterpret_cast<uint16_t*>(row), width_);
  } else {
    to_q8_0(kernels_, x, width_, row);
  }
  kernels_.pack(into.view, into.storage, cell, cell + 1, source);
}

}  // namespace turbosparse
