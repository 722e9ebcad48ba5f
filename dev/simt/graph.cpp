// Stand-in for CUDA graphs: while a stream is captured, what is given to it is written down instead, with its
// parameters as they are at that moment, and is given to streams at each launch of the graph.
#include <memory>
#include <vector>

#include "include/cuda_runtime.h"
#include "streams.h"

struct CUgraph_st {
    simt::Steps steps;
};
struct CUgraphExec_st {
    simt::Steps steps;
    std::vector<cudaStream_t> branches;
};

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) { return simt::begin_capture(stream); }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = nullptr;
    auto whole = std::make_unique<CUgraph_st>();
    if (cudaError_t status = simt::end_capture(stream, whole->steps)) return status;
    *graph = whole.release();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = new CUgraphExec_st{graph->steps, {}};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    return simt::run_steps(exec->steps, stream, exec->branches);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    for (cudaStream_t branch : exec->branches) cudaStreamDestroy(branch);
    delete exec;
    return cudaSuccess;
}
