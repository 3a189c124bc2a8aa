// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define TURBOSPARSE_MMAP 1
#endif

namespace turbosparse {
namespace {

// Mappings double in size up to a gigabyte: few of them, since each may end in a huge page that is half empty.
constexpr size_t kSmallest = size_t{32} << 20;
constexpr size_t kLargest = size_t{1} << 30;
constexpr size_t kLine = 64;

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

Mapping::Mapping(size_t bytes, [[maybe_unused]] bool huge_pages) : size_(bytes) {
  if (bytes == 0) return;
#ifdef TURBOSPARSE_MMAP
  void* pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pointer == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge_pages) madvise(pointer, bytes, MADV_HUGEPAGE);  // advice: refusing it costs speed, nothing else
#endif
#else
  void* pointer = ::operator new(bytes, std::align_val_t{kLine});
  std::memset(pointer, 0, bytes);
#endif
  data_ = static_cast<std::byte*>(pointer);
}

Mapping::~Mapping() {
  if (data_ == nullptr) return;
#ifdef TURBOSPARSE_MMAP
  munmap(data_, size_);
#else
  ::operator delete(data_, std::align_val_t{kLine});
#endif
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::byte* Arena::take(size_t bytes) {
  bytes = round_up(std::max(bytes, size_t{1}), kLine);
  if (pieces_.empty() || pieces_.back().used + bytes > pieces_.back().mapping.size()) {
    pieces_.push_back({Mapping(std::max(bytes, std::clamp(used_, kSmallest, kLargest)))});
  }
  Piece& last = pieces_.back();
  std::byte* taken = last.mapping.data() + last.used;
  last.used += bytes;
  used_ += bytes;
  return taken;
}

std::vector<std::span<const std::byte>> Arena::parts() const {
  std::vector<std::span<const std::byte>> parts;
  for (const Piece& piece : pieces_) parts.emplace_back(piece.mapping.data(), piece.used);
  return parts;
}

}  // namespace turbosparse
