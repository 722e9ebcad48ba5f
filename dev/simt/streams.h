// What the stand-ins of the libraries give to streams.
#pragma once
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "include/cuda_runtime.h"
#include "touched.h"

// The simulator's own copies are nobody's accesses.
#undef memcpy
#undef memset

namespace simt {

// How many operations of each timeline lie before: the host's is the first, then come the streams'.
using Clock = std::vector<uint64_t>;

struct Operation {
    const char* what;                           // "cudaMemsetAsync"; for a kernel "kernel"
    std::source_location at;                    // of the call
    const void* kernel = nullptr;               // if it is one
    bool launch = false;                        // CUDA_LAUNCH_BLOCKING makes it wait for its end
    std::shared_ptr<Touched> touches = nullptr; // what is known before it runs
    // Adds what it finds out while it runs, unless it is given null. What waits for another process returns
    // cudaErrorNotReady, and is called again.
    std::function<cudaError_t(Touched*)> work = nullptr;
};

// Does the work in its stream's time: now, later, or in the graph that is being captured.
cudaError_t give(cudaStream_t stream, Operation operation);
cudaError_t wait_for(cudaStream_t stream);
cudaError_t wait_for_all();
// The host itself is about to touch memory, which it may be about to give back.
void host_touches(const void* p, size_t bytes, bool writes, const char* what, std::source_location at);
void host_releases(const void* p, const char* what, std::source_location at);

// ---- Graphs ----
// A captured sequence: what was given, in the order in which it came, to branches of which the first is the stream that
// began the capture, and events between them.
struct Step {
    enum class Kind { work, record, wait } kind;
    size_t branch;
    size_t event = 0;      // recorded or waited for
    Operation operation{}; // if it is work
};
using Steps = std::vector<Step>;

bool capturing();
bool takes_part(cudaStream_t stream); // in the capture
cudaError_t begin_capture(cudaStream_t origin);
cudaError_t end_capture(cudaStream_t origin, Steps& steps);
// `branches` are streams of the graph's own, made as they are needed.
cudaError_t run_steps(const Steps& steps, cudaStream_t stream, std::vector<cudaStream_t>& branches);

} // namespace simt
