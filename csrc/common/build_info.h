#pragma once

#include <string>
#include <vector>

namespace resona {

// What this binary is, as a JSON object. `instruction_sets` are those that run on this processor.
std::string build_info(const std::vector<std::string>& instruction_sets, const std::string& selected);

}  // namespace resona
