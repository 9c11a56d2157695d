// How a .cu file starts a kernel:
//
//   launch({"pool_kernel", {plan.blocks}, Config::kThreads, 0, after_own_kernel, plan.reason}, stream,
//          pool_kernel<Config>, params);
//
// An empty grid launches nothing. Failure is a std::runtime_error that names the kernel, its launch, its plan
// and CUDA's reason.
#pragma once

#include <type_traits>

#include "cuda/launch_config.h"

namespace resona::cuda {

namespace detail {
void launch(const Launch&, Stream, const void* kernel, void** arguments);
}

template <class... Parameters>
void launch(const Launch& how, Stream stream, void (*kernel)(Parameters...),
            std::common_type_t<Parameters>... arguments) {
  void* pointers[] = {&arguments...};
  detail::launch(how, stream, reinterpret_cast<const void*>(kernel), pointers);
}

}  // namespace resona::cuda
