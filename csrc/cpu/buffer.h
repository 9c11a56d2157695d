// Scratch memory of one worker: uninitialised, aligned to a cache line, rounded up so that a kernel may
// write whole vectors past a ragged end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/huge_pages.h"

namespace resona::cpu {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(bytes(count), std::align_val_t{kAlign}))) {
    ask_for_huge_pages(data_.get(), bytes(count));
  }

  T* data() { return data_.get(); }
  T& operator[](int64_t i) { return data_.get()[i]; }

 private:
  static constexpr size_t kAlign = 64;
  static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 2 * kAlign - 1) / kAlign * kAlign;
  }
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<T, Free> data_;
};

// Rows of scratch matrices are padded to whole vectors of the widest instruction set.
inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

}  // namespace resona::cpu
