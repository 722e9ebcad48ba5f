// Stand-in for CUDA graphs: while a stream is captured, what is launched is written down instead of run, with its
// parameters as they are at that moment, and runs at each launch of the graph.
#include <functional>
#include <memory>
#include <vector>

#include "block.h"
#include "graph.h"
#include "include/cuda_runtime.h"

struct CUgraph_st {
    std::vector<std::function<cudaError_t()>> launches;
};
struct CUgraphExec_st {
    std::vector<std::function<cudaError_t()>> launches;
};

namespace simt {

namespace {
std::unique_ptr<CUgraph_st>& captured() {
    static std::unique_ptr<CUgraph_st> only; // one device, and one stream at a time
    return only;
}
} // namespace

bool capturing() { return captured() != nullptr; }

bool capture(std::function<cudaError_t()> launch) {
    if (!capturing()) return false;
    captured()->launches.push_back(std::move(launch));
    return true;
}

} // namespace simt

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    // The legacy default stream cannot be captured.
    if (!stream || simt::capturing()) return cudaErrorStreamCaptureUnsupported;
    simt::captured() = std::make_unique<CUgraph_st>();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    if (!simt::capturing()) return cudaErrorInvalidValue;
    *graph = simt::captured().release();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = new CUgraphExec_st{graph->launches};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (const auto& launch : exec->launches)
        if (cudaError_t status = launch(); status != cudaSuccess) return status;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}
