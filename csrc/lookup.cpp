// SPDX-License-Identifier: Apache-2.0
#include "lookup.h"

namespace turbosparse {
namespace {

constexpr int64_t kLongest = 16;

// How many tokens before `end` are the last ones of the text, up to kLongest.
int64_t common_end(const std::vector<int32_t>& text, int64_t end) {
  const auto size = static_cast<int64_t>(text.size());
  int64_t n = 0;
  while (n < kLongest && n < end && text[end - 1 - n] == text[size - 1 - n]) ++n;
  return n;
}

}  // namespace

Found lookup(const std::vector<int32_t>& text, int64_t most) {
  const auto size = static_cast<int64_t>(text.size());
  Found found;
  int64_t next = 0;
  for (int64_t end = size - 1; end > 0 && found.length < kLongest; --end) {
    const int64_t length = common_end(text, end);
    if (length > found.length) found.length = length, next = end;
  }
  if (found.length == 0) return found;
  for (int64_t i = 0; i < most; ++i) {
    const int64_t at = next + i;
    found.tokens.push_back(at < size ? text[at] : found.tokens[at - size]);
  }
  return found;
}

}  // namespace turbosparse
