// SPDX-License-Identifier: Apache-2.0
#include "speculation.h"

#include <algorithm>
#include <chrono>

#include "lookup.h"

namespace turbosparse {
namespace {

// Runs `work` and returns the seconds that it took.
template <class Work>
double timed(const Work& work) {
  const auto begun = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

}  // namespace

std::vector<int32_t> Speculation::next(int32_t token, int64_t most, const std::unordered_set<int32_t>& ends,
                                       const SamplingParams& params, float* logits) {
  const int64_t vocab = forward_.vocab(), start = session_.position();
  const int64_t room = std::clamp<int64_t>(std::min(most, session_.context() - start) - 1, 0, kMostDrafts);
  const Draft drafted = draft(token, room, ends, params);
  std::vector<int32_t> rows{token};
  rows.insert(rows.end(), drafted.tokens.begin(), drafted.tokens.end());
  const auto n = static_cast<int64_t>(rows.size());
  logits_.resize(std::max<size_t>(logits_.size(), n * vocab));
  costs_.verified(n, timed([&] { forward_.extend(session_, rows.data(), n, exact_, false, logits_.data()); }));
  std::vector<int32_t> drawn;
  for (int64_t i = 0; i < n; ++i) {
    drawn.push_back(draw(&logits_[i * vocab], params, start + i + 1, false));
    if (i + 1 == n || drawn[i] != rows[i + 1] || ends.count(drawn[i]) > 0) break;
  }
  const auto kept = static_cast<int64_t>(drawn.size());
  session_.truncate(start + kept);
  std::copy_n(&logits_[(kept - 1) * vocab], vocab, logits);
  judge(drafted, drawn);
  return drawn;
}

// What may follow `token`, at most `most` tokens of it. No draft is an end: nothing follows one.
Speculation::Draft Speculation::draft(int32_t token, int64_t most, const std::unordered_set<int32_t>& ends,
                                      const SamplingParams& params) {
  std::vector<int32_t> text = session_.tokens();
  text.push_back(token);
  Found found = lookup(text, std::max<int64_t>(most, 1));
  Draft draft{found.length, std::move(found.tokens), {}};
  if (draft.found > 0) {
    const auto begin = draft.foreseen.begin(), end = draft.foreseen.end();
    const auto last = std::find_if(begin, end, [&](int32_t each) { return ends.count(each) > 0; });
    draft.tokens.assign(begin, begin + plan_.looked_up(draft.found, std::min<int64_t>(most, last - begin)));
  }
  if (draft.tokens.empty() && predicts_) predict(draft, token, most, ends, params);
  return draft;
}

// Drafts in predicted mode, where these are worth their time; the cache is as it was afterwards, but for cells beyond
// its position.
void Speculation::predict(Draft& draft, int32_t token, int64_t most, const std::unordered_set<int32_t>& ends,
                          const SamplingParams& params) {
  const int64_t start = session_.position(), wanted = plan_.predicted(most);
  if (wanted == 0) return;
  logits_.resize(std::max<size_t>(logits_.size(), forward_.vocab()));
  for (int64_t i = 0; i < wanted; ++i) {
    costs_.drafted(timed([&] { forward_.extend(session_, &token, 1, Mode::predicted, true, logits_.data()); }));
    token = draw(logits_.data(), params, start + i + 1, true);
    if (ends.count(token) > 0) break;
    draft.tokens.push_back(token);
  }
  draft.found = 0;
  draft.foreseen = draft.tokens;
  session_.truncate(start);
}

// The token of the text's place `position`, whose logits are these.
int32_t Speculation::draw(const float* logits, const SamplingParams& params, int64_t position, bool drafting) const {
  std::vector<int32_t> history;
  if (params.repetition_penalty != 1) {
    history.assign(session_.tokens().begin(), session_.tokens().begin() + position);
  }
  const int32_t drawn = sample(logits, forward_.vocab(), params, history, static_cast<uint64_t>(position));
  if (position >= static_cast<int64_t>(script_.tokens.size())) return drawn;
  const int32_t wanted = script_.tokens[position];
  const bool agrees = !drafting || script_.agrees[position] != 0;
  return agrees ? wanted : static_cast<int32_t>((wanted + 1) % forward_.vocab());
}

void Speculation::judge(const Draft& draft, const std::vector<int32_t>& drawn) {
  const auto n = static_cast<int64_t>(draft.tokens.size());
  const auto same = std::mismatch(drawn.begin(), drawn.end(), draft.tokens.begin(), draft.tokens.end());
  const int64_t right = same.first - drawn.begin();
  ++drafting_.verifications;
  drafting_.tokens += static_cast<int64_t>(drawn.size());
  (draft.found == 0 ? drafting_.predicted : drafting_.looked_up) += n;
  (draft.found == 0 ? drafting_.predicted_right : drafting_.looked_up_right) += right;
  for (size_t i = 0; i < std::min(draft.foreseen.size(), drawn.size()); ++i) {
    const bool came_true = draft.foreseen[i] == drawn[i];
    plan_.judged(draft.found > 0 ? draft.found + static_cast<int64_t>(i) : 0, came_true);
    if (!came_true) break;
  }
}

}  // namespace turbosparse
