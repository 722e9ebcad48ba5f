// The capture of launches, as the stand-ins of the libraries see it.
#pragma once
#include <functional>

#include "include/cuda_runtime.h"

namespace simt {

bool capturing();
// Takes the launch down for later if a stream is being captured, else returns false: run it now.
bool capture(std::function<cudaError_t()> launch);

} // namespace simt
