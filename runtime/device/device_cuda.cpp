// The machine of the cuda and simt builds, through the CUDA runtime or dev/simt's stand-in for it.
#include "device.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include <omp.h>

#include "../../kernels/launch.h"
#include "../base/errors.h"
#include "../base/random.h"

#ifdef LONGHAND_SIMT
static const char* const kBuild = "simt ";
#else
static const char* const kBuild = "cuda ";
#endif

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static cudaDeviceProp properties() {
    int device = 0;
    cudaDeviceProp found{};
    check_cuda(cudaGetDevice(&device), "asking which GPU is in use");
    check_cuda(cudaGetDeviceProperties(&found, device), "asking for the GPU's properties");
    return found;
}

void check_machine() {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
        throw RunFailed(std::string("no GPU to run on: ") + cudaGetErrorString(status) +
                        "; check nvidia-smi, or use the cpu build (make cpu)");
    cudaDeviceProp gpu = properties();
    if (gpu.major < 8)
        throw RunFailed(std::string(gpu.name) + " has compute capability " + std::to_string(gpu.major) + "." +
                        std::to_string(gpu.minor) + "; bf16 tensor cores need 8.0 (A100, RTX 30) or later");
}

// A GPU that drives a display ends every kernel that keeps it from that for some seconds.
static void warn_of_a_display() {
    int timeout = 0;
    check_cuda(cudaDeviceGetAttribute(&timeout, cudaDevAttrKernelExecTimeout, 0), "asking for the GPU's properties");
    if (timeout)
        warn("this GPU also drives a display, and ends a kernel after some seconds, as attention's at hundreds of "
             "thousands of tokens may need: use another GPU, run without a display, or lower --head-group");
}

// The best of a few square products, as large as fills the machine for about a millisecond. Of random numbers: products
// of zeros take less power, and so run at a higher clock than any step does.
static double measure_peak(const Device& device) {
    constexpr int64_t kPattern = int64_t(1) << 18;
    std::vector<real> pattern(kPattern);
    for (int64_t i = 0; i < kPattern; i++) assign(pattern[i], float(random_normal(0, 0, i)));
    double best = 0;
    for (int64_t n = 1024; n <= 8192; n *= 2) {
        real *a, *b, *c; // (n,n)
        size_t bytes = n * n * sizeof(real);
        for (real** matrix : {&a, &b, &c}) {
            *matrix = static_cast<real*>(device_alloc(bytes));
            for (int64_t i = 0; i < n * n; i += kPattern)
                upload(device, *matrix + i, pattern.data(), kPattern * sizeof(real));
        }
        real sink;
        auto product = [&] {
            matmul_forward(device.matmul, c, nullptr, a, b, nullptr, n, n, n);
            check_cuda(cudaStreamSynchronize(cuda_stream(device.stream)), "measuring the matmul rate");
        };
        product(); // the library chooses and loads its kernel
        double begin = seconds(), fastest = 1e30;
        for (int run = 0; run < 3 || (run < 20 && seconds() - begin < 0.1); run++) {
            double start = seconds();
            product();
            fastest = std::min(fastest, seconds() - start);
        }
        download(device, &sink, c, sizeof sink);
        for (real* matrix : {a, b, c}) device_free(matrix, bytes);
        best = std::max(best, matmul_forward_cost(n, n, n).flops / fastest);
        if (fastest > 1e-3) break;
    }
    return best;
}

// Two pieces of pinned memory that take turns: the host fills or empties one while the GPU still reads or writes the
// other, or has not begun. A copy from or to pageable memory would be slower, and wait for all launches before it.
struct Staging {
    static constexpr size_t kBytes = size_t(1) << 20;
    void* memory[2] = {};
    cudaEvent_t copied[2] = {}; // the copy out of it, or into it, is done
    int next = 0;

    Staging() {
        for (int i = 0; i < 2; i++) {
            check_cuda(cudaMallocHost(&memory[i], kBytes), "allocating pinned memory");
            check_cuda(cudaEventCreateWithFlags(&copied[i], cudaEventDisableTiming), "creating an event");
        }
    }
    ~Staging() {
        for (int i = 0; i < 2; i++) cudaEventDestroy(copied[i]), cudaFreeHost(memory[i]);
    }

    int take() {
        next = 1 - next;
        return next;
    }
    void copy(cudaStream_t stream, int slot, void* to, const void* from, size_t bytes) {
        check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copying to or from the GPU");
        check_cuda(cudaEventRecord(copied[slot], stream), "copying to or from the GPU");
    }
    void wait(int slot) { check_cuda(cudaEventSynchronize(copied[slot]), "waiting for the GPU"); }
};

#ifdef LONGHAND_SIMT
void choose_device(int) {}
std::string device_identity() { return ""; }
#else
void choose_device(int number) {
    int count = 0;
    const bool known = cudaGetDeviceCount(&count) == cudaSuccess;
    if (known && count == 1) number = 0; // a launcher may show each rank its own GPU alone; a shared one is found later
    if (known && number >= count)
        throw BadInput("this rank is number " + std::to_string(number) + " of its machine, which has " +
                       std::to_string(count) + (count == 1 ? " GPU" : " GPUs") + "; start one rank a GPU");
    check_cuda(cudaSetDevice(number), "choosing this rank's GPU");
}

std::string device_identity() {
    const cudaUUID_t uuid = properties().uuid;
    std::string text;
    for (const char byte : uuid.bytes) {
        char digits[3];
        snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte));
        text += digits;
    }
    return text;
}
#endif

Target this_target() { return {.cuda = true, .real_bytes = sizeof(real), .threads = omp_get_max_threads()}; }

Device::Device(int64_t wanted) {
    if (wanted > 0) omp_set_num_threads(static_cast<int>(wanted));
    target = this_target();
    threads = omp_get_max_threads();
    check_machine();
    cudaStream_t created;
    check_cuda(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking), "creating a stream");
    stream = reinterpret_cast<Stream>(created);
    staging = new Staging;
    warn_of_a_display();
    matmul = matmul_open(stream);
    peak_flops = measure_peak(*this);
}

Device::~Device() {
    if (!matmul) return;
    matmul_close(matmul); // frees its work space, and so waits for all that the GPU still does
    delete staging;
    cudaStreamDestroy(cuda_stream(stream));
}

double peak_percent(const Device& device, double flops_per_second) {
    device.peak_flops = std::max(device.peak_flops, flops_per_second); // memory for another measurement is all taken
    return 100 * flops_per_second / device.peak_flops;
}

std::string device_line(const Device& device) {
    cudaDeviceProp gpu = properties();
    char line[512];
    snprintf(line, sizeof line, "%s%s, %s (sm_%d%d, %d SMs, %.0f GiB), %d host threads, %.0f TFLOP/s measured", kBuild,
             kPrecision, gpu.name, gpu.major, gpu.minor, gpu.multiProcessorCount,
             double(gpu.totalGlobalMem) / (1 << 30), device.threads, device.peak_flops / 1e12);
    return line;
}

// By their addresses the runtime tells what it copies between: `device` memory of a HostStore is the host's.
void upload(const Device& device, void* to, const void* from, size_t bytes) {
    Staging& staging = *device.staging;
    for (size_t done = 0; done < bytes; done += Staging::kBytes) {
        const size_t piece = std::min(Staging::kBytes, bytes - done);
        const int slot = staging.take();
        staging.wait(slot);
        memcpy(staging.memory[slot], static_cast<const char*>(from) + done, piece);
        staging.copy(cuda_stream(device.stream), slot, static_cast<char*>(to) + done, staging.memory[slot], piece);
    }
}

void download(const Device& device, void* to, const void* from, size_t bytes) {
    Staging& staging = *device.staging;
    size_t arrived = 0;
    int before = 0; // the slot of the piece that is under way
    auto finish = [&](size_t end) {
        if (arrived == end) return;
        staging.wait(before);
        memcpy(static_cast<char*>(to) + arrived, staging.memory[before], end - arrived);
        arrived = end;
    };
    for (size_t begun = 0; begun < bytes; begun += Staging::kBytes) {
        const int slot = staging.take();
        staging.copy(cuda_stream(device.stream), slot, staging.memory[slot], static_cast<const char*>(from) + begun,
                     std::min(Staging::kBytes, bytes - begun));
        finish(begun);
        before = slot;
    }
    finish(bytes);
}

void fill_zero(const Device& device, void* to, size_t bytes) {
    check_cuda(cudaMemsetAsync(to, 0, bytes, cuda_stream(device.stream)), "clearing GPU memory");
}
