#include "ops/tuning.h"

#include <mutex>
#include <stdexcept>
#include <utility>

namespace resona::ops {
namespace {

std::mutex mutex;
CudaTuning tuning;

std::string names() {
  std::string all;
  for (const TuningField& field : tuning_fields()) all += (all.empty() ? "" : ", ") + std::string(field.name);
  return all;
}

[[noreturn]] void refuse(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument("resona::_tune_cuda: " + argument + ": expected " + expected + ", got " + got);
}

}  // namespace

CudaTuning cuda_tuning() {
  const std::lock_guard<std::mutex> lock(mutex);
  return tuning;
}

int64_t tune_cuda(const std::string& name, int64_t value) {
  const TuningField* field = find_tuning_field(name);
  if (field == nullptr) refuse("name", "one of " + names(), name);
  if (value < field->least || value > field->most)
    refuse("value", std::to_string(field->least) + " to " + std::to_string(field->most) + " for " + name,
           std::to_string(value));
  const std::lock_guard<std::mutex> lock(mutex);
  return std::exchange(tuning.*field->value, value);
}

}  // namespace resona::ops
