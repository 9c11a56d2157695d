// What a test hands to a runner, by name, and how runners make themselves known to Python.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

namespace simt {

struct Array {
  void* data;
  size_t item_bytes;
};

class Arguments {
 public:
  std::map<std::string, Array> arrays;
  std::map<std::string, int64_t> integers;
  std::map<std::string, std::string> texts;

  int64_t integer(const std::string& name) const { return find(integers, name); }
  const std::string& text(const std::string& name) const { return find(texts, name); }

  template <class T>
  T* array(const std::string& name) const {
    const Array& found = find(arrays, name);
    if (found.item_bytes != sizeof(T))
      throw std::invalid_argument("array '" + name + "': expected items of " + std::to_string(sizeof(T)) +
                                  " bytes, got " + std::to_string(found.item_bytes));
    return static_cast<T*>(found.data);
  }

  // Null where the test passes none.
  template <class T>
  T* optional_array(const std::string& name) const {
    return arrays.count(name) ? array<T>(name) : nullptr;
  }

 private:
  template <class V>
  static const V& find(const std::map<std::string, V>& values, const std::string& name) {
    const auto found = values.find(name);
    if (found == values.end()) throw std::invalid_argument("argument '" + name + "' is missing");
    return found->second;
  }
};

using Runner = void (*)(const Arguments&);
std::map<std::string, Runner>& runners();

// One per kernel, in tests/simt/kernels: `static simt::Registration pool("pool", run_pool);`
struct Registration {
  Registration(const char* name, Runner runner) { runners()[name] = runner; }
};

}  // namespace simt
