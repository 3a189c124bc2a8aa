// SPDX-License-Identifier: Apache-2.0
// Large, zeroed, lazily backed memory.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

namespace turbosparse {

// One mapping. Pages are zero and take physical memory only when first written.
class Mapping {
 public:
  Mapping() = default;
  // Huge pages are for what is read whole; what is touched here and there would pay for two megabytes at every touch.
  explicit Mapping(size_t bytes, bool huge_pages = true);  // throws std::bad_alloc
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out pieces of mappings, aligned to 64 bytes; all are freed together.
class Arena {
 public:
  std::byte* take(size_t bytes);
  size_t used() const { return used_; }
  // What was handed out, mapping by mapping.
  std::vector<std::span<const std::byte>> parts() const;

 private:
  struct Piece {
    Mapping mapping;
    size_t used = 0;
  };
  std::vector<Piece> pieces_;
  size_t used_ = 0;
};

}  // namespace turbosparse
