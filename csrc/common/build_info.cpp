#include "common/build_info.h"

namespace resona {
namespace {

std::string quoted(const std::string& text) { return '"' + text + '"'; }

}  // namespace

std::string build_info(const std::vector<std::string>& instruction_sets, const std::string& selected) {
  std::string names;
  for (const std::string& name : instruction_sets) names += (names.empty() ? "" : ", ") + quoted(name);
  return "{" + quoted("version") + ": " + quoted(RESONA_VERSION) + ", " + quoted("compiler") + ": " +
         quoted(RESONA_COMPILER) + ", " + quoted("torch_target") + ": " + quoted(RESONA_TORCH_TARGET) + ", " +
         quoted("cuda") + ": " + quoted(RESONA_CUDA) + ", " + quoted("cpu_isas") + ": [" + names + "], " +
         quoted("cpu_isa") + ": " + quoted(selected) + "}";
}

}  // namespace resona
