// The capture of launches, as the stand-ins of the libraries see it.
#pragma once
#include <functional>

#include "include/cuda_runtime.h"

namespace simt {

bool capturing();
// Takes the launch down for later if a stream is being captured, else returns false: run it now.
bool capture(std::function<cudaError_t()> launch);

// streams.cpp: which streams take part. end_capture() says whether all of them have been joined.
void begin_capture(cudaStream_t origin);
cudaError_t end_capture(cudaStream_t origin);

// Does the copy or fill in its stream's time: now, later, or in the graph that is being captured.
cudaError_t give(cudaStream_t stream, std::function<cudaError_t()> work);
bool takes_part(cudaStream_t stream); // in the capture
cudaError_t finish_streams();

} // namespace simt
