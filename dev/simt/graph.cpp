// Stand-in for CUDA graphs: while a stream is captured, what is launched is written down instead of run, with its
// parameters as they are at that moment, and runs at each launch of the graph, in the order in which it came.
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
    static std::unique_ptr<CUgraph_st> only; // one device, and one capture at a time
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
    simt::begin_capture(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = nullptr;
    if (!simt::capturing()) return cudaErrorInvalidValue;
    std::unique_ptr<CUgraph_st> whole = std::move(simt::captured());
    if (cudaError_t status = simt::end_capture(stream)) return status;
    *graph = whole.release();
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
