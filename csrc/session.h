// SPDX-License-Identifier: Apache-2.0
// One sequence being read or written: its KV cache, its position and the forward pass.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "memory.h"
#include "model.h"

namespace turbosparse {

enum class Mode { dense, exact };

// How many tokens of a prompt go through the layers together.
inline constexpr int64_t kPrefillBlock = 64;

class Session {
 public:
  Session(std::shared_ptr<Model> model, int64_t context);

  // Run `n` tokens from the current position on. logits: [n, vocab] if all_logits, else [vocab] after the last token.
  // `decode`: one token by itself, whose cost is counted. Throws std::invalid_argument on a bad token id or when the
  // context is full.
  void forward(const int32_t* tokens, int64_t n, Mode mode, bool all_logits, bool decode, float* logits);

  int64_t position() const { return position_; }
  int64_t context() const { return context_; }
  int64_t vocab() const { return config_.vocab; }
  // Forget all tokens from `position` on. What is kept has the bits that it had: keys and values lie by position.
  void truncate(int64_t position);

 private:
  // Room for a set of inputs of matrix products, in fp32 and as int8 blocks.
  struct Prepared {
    std::vector<float> x, scale;
    std::vector<int8_t> q;
    std::vector<int32_t> sum;
    void resize(int64_t n, int64_t cols);
    Vectors view(int64_t n, int64_t cols, bool quantized) const;
  };
  // The inputs of a product. Blocks of int8 lose more than Q8_0 weights do, so for these a second int8 vector holds
  // what the first one left: x = values + rest, to some 15 bits. `rest.count` is 0 where it is not needed.
  struct Inputs {
    Vectors values, rest;
    Vectors both() const {
      Vectors v = values;
      if (rest.count > 0) v.rest = &rest;
      return v;
    }
  };
  // What a member needs for itself.
  struct Scratch {
    Prepared input, rest;
    std::vector<float> scores, gate, up, coefficient;
    std::vector<int32_t> open, active;
    Traffic traffic;
  };
  struct Pass;  // the arguments of one forward pass, shared by the members

  void block(const Pass& pass);
  void run(Member& member, const Pass& pass);
  void embed(Member& member, const Pass& pass);
  void attention(Member& member, const Pass& pass, int64_t index);
  void rotate(float* head, const float* cosine, const float* sine) const;
  void store_keys_and_values(Member& member, const Pass& pass, int64_t index);
  void attend(Member& member, int64_t index, int64_t token, int64_t head, int64_t heads);
  void dense_ffn(Member& member, const Pass& pass, int64_t index);
  void sparse_ffn(Member& member, const Pass& pass, int64_t index);
  void neuron_block(Scratch& scratch, const Pass& pass, int64_t index, int64_t block, const Inputs& x);
  void reduce_blocks(Member& member, const Pass& pass);
  void head(Member& member, const Pass& pass);

  // Make vectors (the residual stream, for `normed`) the inputs of products with `w` and matrices of its type; every
  // member gets all n of them.
  Inputs normed(Member& member, int64_t n, const float* weight, const Matrix& w);
  Inputs prepare(Member& member, int64_t n, const Matrix& w, const float* source, int64_t stride, const float* norm);
  void add_to_residual(Member& member, const Pass& pass, const Matrix& w, const Inputs& x, const float* post_norm);
  void multiply(Member& member, const Matrix& w, const Inputs& x, float* out, int64_t stride);
  // Rows [first, last) of w; row r of vector v goes to out[v * stride + r].
  void product(Scratch& scratch, const Matrix& w, int64_t first, int64_t last, const Inputs& x, float* out,
               int64_t stride);
  void listed_product(Scratch& scratch, const Matrix& w, int64_t n, const Inputs& x, int64_t vector);
  void norm_into_residual(Member& member, int64_t n, const float* post_norm);

  Matrix cached(const Mapping& cache, int64_t layer, int64_t kv_head) const;
  std::byte* cell(const Mapping& cache, int64_t layer, int64_t kv_head, int64_t position) const;

  std::shared_ptr<Model> model_;
  const Config& config_;
  const Kernels& kernels_;
  int64_t context_, position_ = 0;
  int64_t element_bytes_;           // of the cache: 4 (fp32) or 2 (fp16)
  Mapping keys_, values_;           // [layers, kv_heads, context, head_dim]
  std::vector<int32_t> positions_;  // 0, 1, 2 ...
  std::vector<float> residual_, update_, qkv_, attended_, hidden_, partial_;
  std::vector<float> cosine_, sine_, cosine_local_, sine_local_;
  Prepared shared_, shared_rest_;
  std::vector<Scratch> scratch_;
  Counts* counts_ = nullptr;  // the model's, while it counts
  std::atomic<int64_t> next_block_{0};
};

}  // namespace turbosparse
