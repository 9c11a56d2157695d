#pragma once

#include <string>
#include <vector>

namespace resona {

// What this binary is, as a JSON object. `instruction_sets` are those that run on this processor.
std::string build_info(const std::vector<std::string>& instruction_sets, const std::string& selected);

// What the CUDA kernels were compiled for, as cuobjdump names it: "sm_80 sm_90a compute_80"; empty without
// CUDA.
std::string cuda_architectures();

}  // namespace resona
