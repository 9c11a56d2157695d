#pragma once

#include <string>
#include <vector>

namespace resona::cpu {

// Names of the compiled instruction sets that this processor runs, widest first.
std::vector<std::string> runnable_instruction_sets();

}  // namespace resona::cpu
