// Parts of one allocation, each aligned for any vector load. Without memory behind it a workspace only
// counts, so the size of a workspace and the places in it come from the same lines.
#pragma once

#include <cstdint>

namespace resona {

class Workspace {
 public:
  static constexpr int64_t kAlignment = 256;

  explicit Workspace(void* memory = nullptr) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(begin_ + static_cast<uintptr_t>(bytes_));
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t begin_;
  int64_t bytes_ = 0;
};

}  // namespace resona
