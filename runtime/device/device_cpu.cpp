#include "device.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <thread>
#include <vector>

#include <omp.h>

#include "../base/errors.h"

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What a thread computed on average: a neighbour's turns do not count, but neither do cores that are not there.
static double thread_seconds() {
    timespec time{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double(time.tv_sec) + 1e-9 * double(time.tv_nsec)) / omp_get_max_threads();
}

// The best of some square products by a clock: what a step could reach if it did nothing else. The small ones find a
// moment between two turns of a busy neighbour; many cores are kept busy by large ones only. Every start of a program
// pays for them, so they are few: a step that is faster has them taken again (peak_percent()).
static double measure_peak(Matmul* mm, double (*clock)()) {
    double best = 0;
    for (int64_t n : {512, 1024}) {
        if (n > 512 && omp_get_max_threads() <= 8) break;
        std::vector<real> a(n * n), b(n * n), c(n * n);
        for (real& x : a) assign(x, 0.5f);
        for (real& x : b) assign(x, 0.25f);
        const double begin = seconds();
        for (int run = 0; run < 2 || (run < 50 && seconds() - begin < 0.01); run++) {
            const double start = clock();
            matmul_forward(mm, c.data(), nullptr, a.data(), b.data(), nullptr, n, n, n);
            best = std::max(best, matmul_forward_cost(n, n, n).flops / (clock() - start));
        }
    }
    return best;
}

void choose_device(int) {}
std::string device_identity() { return ""; }

Target this_target() { return {.cuda = false, .real_bytes = sizeof(real), .threads = omp_get_max_threads()}; }

void check_machine() {}

Device::Device(int64_t wanted) {
    if (wanted > 0) omp_set_num_threads(static_cast<int>(wanted));
    target = this_target();
#pragma omp parallel
#pragma omp single
    threads = omp_get_num_threads();
    if (threads == 1 && wanted != 1 && std::thread::hardware_concurrency() > 1)
        warn("running on one thread of " + std::to_string(std::thread::hardware_concurrency()) +
             "; --threads or OMP_NUM_THREADS set the number");
    matmul = matmul_open(stream);
    peak_flops = measure_peak(matmul, seconds);
}

Device::~Device() {
    if (matmul) matmul_close(matmul);
}

double peak_percent(const Device& device, double flops_per_second) {
    if (flops_per_second > device.peak_flops)
        device.peak_flops = std::max(flops_per_second, measure_peak(device.matmul, thread_seconds));
    return 100 * flops_per_second / device.peak_flops;
}

std::string device_line(const Device& device) {
    std::string name = "unknown processor", line;
    for (std::ifstream info("/proc/cpuinfo"); std::getline(info, line);)
        if (line.rfind("model name", 0) == 0) {
            name = line.substr(line.find(':') + 2);
            break;
        }
    char peak[64];
    snprintf(peak, sizeof peak, "%.0f GFLOP/s measured", device.peak_flops / 1e9);
    return std::string("cpu ") + kPrecision + ", " + name + ", " + std::to_string(device.threads) +
           (device.threads == 1 ? " thread, " : " threads, ") + peak;
}

void upload(const Device&, void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
void download(const Device&, void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

void fill_zero(const Device&, void* to, size_t bytes) {
    const size_t kPage = 4096;
    int64_t pages = (bytes + kPage - 1) / kPage;
#pragma omp parallel for schedule(static)
    for (int64_t page = 0; page < pages; page++)
        memset(static_cast<char*>(to) + page * kPage, 0, std::min(kPage, bytes - page * kPage));
}
