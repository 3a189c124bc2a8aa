// SPDX-License-Identifier: Apache-2.0
// Drafts that cost nothing: what followed the last time that the text ended like this (prompt lookup decoding, Saxena
// 2023; Leviathan et al., arXiv 2211.17192, verify such guesses).
#pragma once

#include <cstdint>
#include <vector>

namespace turbosparse {

struct Found {
  int64_t length = 0;           // of the end of the text that was found earlier in it; 0: it was not
  std::vector<int32_t> tokens;  // what may follow, `most` of them where length > 0
};

// Looks for the longest end of `text` that occurs earlier in it, the latest of equally long ones; ends of more than 16
// tokens count as 16. A text that repeats itself is continued beyond its end.
Found lookup(const std::vector<int32_t>& text, int64_t most);

}  // namespace turbosparse
