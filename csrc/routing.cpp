// SPDX-License-Identifier: Apache-2.0
#include "routing.h"

#include <cmath>
#include <numeric>

namespace turbosparse {
namespace {

// One row of Routing::choose: marks what is chosen and gives it its share.
void choose_row(const float* score, int64_t experts, int64_t used, uint8_t* chosen, float* share) {
  float highest = 0, total = 0;
  for (int64_t i = 0; i < used; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (!chosen[e] && (best < 0 || score[e] > score[best])) best = e;
    }
    if (i == 0) highest = score[best];
    chosen[best] = 1;
    share[best] = std::exp(score[best] - highest);
    total += share[best];
  }
  for (int64_t e = 0; e < experts; ++e) share[e] /= total;
}

}  // namespace

void Routing::all(int64_t n) {
  groups.assign(1, {0, 0, n});
  row.resize(n);
  std::iota(row.begin(), row.end(), 0);
  weight.assign(n, 1.0f);
}

void Routing::choose(const float* scores, int64_t n, int64_t experts, int64_t used) {
  groups.clear();
  row.clear();
  weight.clear();
  share_.assign(n * experts, 0.0f);
  chosen_.assign(n * experts, 0);
  for (int64_t t = 0; t < n; ++t) {
    choose_row(scores + t * experts, experts, used, &chosen_[t * experts], &share_[t * experts]);
  }
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = slots();
    for (int64_t t = 0; t < n; ++t) {
      if (!chosen_[t * experts + e]) continue;
      row.push_back(static_cast<int32_t>(t));
      weight.push_back(share_[t * experts + e]);
    }
    if (slots() > first) groups.push_back({e, first, slots() - first});
  }
}

}  // namespace turbosparse
