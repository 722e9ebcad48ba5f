#include "recording.h"

#include <cstdlib>
#include <string>

#include "../../kernels/launch.h"

struct Recording::Graph {
    std::vector<double> key;
    int runs = 0; // with this key
    cudaGraphExec_t exec = nullptr;

    void forget() {
        if (exec) cudaGraphExecDestroy(exec);
        exec = nullptr;
    }
    ~Graph() { forget(); }
};

Recording::Recording() : graph_(std::make_unique<Graph>()) {}
Recording::~Recording() = default;

// With CUDA_LAUNCH_BLOCKING a failing kernel is to be found at its own launch.
static bool wanted() {
    const char* blocking = getenv("CUDA_LAUNCH_BLOCKING");
    return !blocking || std::string(blocking) != "1";
}

static cudaGraphExec_t record(cudaStream_t stream, const std::function<void()>& launches) {
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning to record a step");
    try {
        launches();
    } catch (...) {
        cudaStreamEndCapture(stream, &graph); // the stream must be usable again
        if (graph) cudaGraphDestroy(graph);
        throw;
    }
    check_cuda(cudaStreamEndCapture(stream, &graph), "recording a step");
    cudaGraphExec_t exec = nullptr;
    cudaError_t status = cudaGraphInstantiateWithFlags(&exec, graph, 0);
    cudaGraphDestroy(graph);
    check_cuda(status, "preparing a recorded step");
    return exec;
}

void Recording::run(const Device& device, const std::vector<double>& key, const std::function<void()>& launches) {
    Graph& g = *graph_;
    if (g.key != key) {
        g.forget();
        g.key = key, g.runs = 0;
    }
    if (g.runs++ == 0 || !wanted()) return launches();
    cudaStream_t stream = cuda_stream(device.stream);
    if (!g.exec) g.exec = record(stream, launches);
    check_cuda(cudaGraphLaunch(g.exec, stream), "launching a recorded step");
}
