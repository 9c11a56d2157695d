#include "common/build_info.h"

#include <sstream>

namespace resona {
namespace {

std::string quoted(const std::string& text) { return '"' + text + '"'; }

std::string list_of(const std::vector<std::string>& texts) {
  std::string list;
  for (const std::string& text : texts) list += (list.empty() ? "" : ", ") + quoted(text);
  return "[" + list + "]";
}

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

}  // namespace

std::string cuda_architectures() { return RESONA_CUDA_ARCHITECTURES; }

std::string build_info(const std::vector<std::string>& instruction_sets, const std::string& selected) {
  return "{" + quoted("version") + ": " + quoted(RESONA_VERSION) + ", " + quoted("compiler") + ": " +
         quoted(RESONA_COMPILER) + ", " + quoted("torch_target") + ": " + quoted(RESONA_TORCH_TARGET) + ", " +
         quoted("cuda") + ": " + quoted(RESONA_CUDA) + ", " + quoted("cuda_architectures") + ": " +
         list_of(words_of(cuda_architectures())) + ", " + quoted("cpu_isas") + ": " +
         list_of(instruction_sets) + ", " + quoted("cpu_isa") + ": " + quoted(selected) + "}";
}

}  // namespace resona
