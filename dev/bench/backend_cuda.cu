#include "bench.h"

#include "../../kernels/device.h"
#include "../../kernels/launch.h"
#include "../../runtime/device/memory.h"

namespace bench {

void* allocate(size_t bytes) { return device_alloc(bytes); }
void release(void* pointer, size_t bytes) { device_free(pointer, bytes); }
void upload(void* to, const void* from, size_t bytes) {
    check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copying to the GPU");
}

void wait() { check_cuda(cudaDeviceSynchronize(), "waiting for the GPU"); }
// A wait costs some microseconds; a tenth of a second of calls at most.
int calls_per_wait(double seconds_of_one) { return std::clamp(static_cast<int>(2e-3 / seconds_of_one), 1, 100); }
bool is_gpu() { return true; }
int64_t square_size() { return 8192; }

namespace {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kPiece = kThreads * kUnroll; // 16-byte words that a block reads or writes at once

// Block b takes the b'th, b+grid'th, … piece of both streams, which are `pieces` pieces long together at the most.
__global__ void __launch_bounds__(kThreads)
    stream_bytes(float4* to, int64_t writes, const float4* from, int64_t reads, int64_t pieces) {
    float4 sum = {0, 0, 0, 0};
    for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        int64_t first = piece * kPiece + threadIdx.x;
        if (piece * kPiece + kPiece <= reads) {
            float4 words[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; i++) words[i] = load_global(from + first + i * kThreads);
#pragma unroll
            for (int i = 0; i < kUnroll; i++)
                sum.x += words[i].x, sum.y += words[i].y, sum.z += words[i].z, sum.w += words[i].w;
        }
        if (piece * kPiece + kPiece <= writes) {
#pragma unroll
            for (int i = 0; i < kUnroll; i++) store_global(to + first + i * kThreads, sum);
        }
    }
    if (sum.x == 12345.f) store_global(to, sum); // so that no read is dropped as unused
}

} // namespace

double bandwidth_ceiling(double read_bytes, double written_bytes) {
    constexpr double kLargest = 1 << 30;
    double shrink = std::min(1.0, kLargest / (read_bytes + written_bytes));
    const int64_t reads = int64_t(read_bytes * shrink / sizeof(float4) / kPiece + 1) * kPiece;
    const int64_t writes =
        written_bytes > 0 ? int64_t(written_bytes * shrink / sizeof(float4) / kPiece + 1) * kPiece : 0;
    const int64_t pieces = std::max(reads, writes) / kPiece;
    Buffer from(reads * sizeof(float4)), to(std::max<int64_t>(writes, 1) * sizeof(float4));
    Timing t = time_call(
        [&] {
            launch(stream_bytes, blocks_for(pieces, 1), kThreads, 0, nullptr, to.as<float4>(), writes,
                   from.as<float4>(), reads, pieces);
        },
        0.05);
    return double(reads + writes) * sizeof(float4) / t.best;
}

std::string machine() {
    cudaDeviceProp gpu{};
    check_cuda(cudaGetDeviceProperties(&gpu, 0), "asking for the GPU's properties");
    constexpr int64_t kBytes = int64_t(1) << 30;
    Buffer from(kBytes), to(kBytes);
    Timing t = time_call(
        [&] { check_cuda(cudaMemcpyAsync(to.floats(), from.floats(), kBytes, cudaMemcpyDeviceToDevice), "copying"); });
    char line[384];
    snprintf(line, sizeof line, "%s, device copy %.0f GB/s", gpu.name, 2.0 * kBytes / t.best / 1e9);
    return line;
}

} // namespace bench
