// What the benches share: timing, and the ceilings that a layer's time is held against. Both ceilings are measured in
// the same run on the same threads, so that a figure means the same on any machine.
//
//   bench::Table table;
//   table.run("gelu forward", "256x3072", gelu_forward_cost(n), [&] { gelu_forward(...); })
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "../../kernels/matmul.h"
#include "backend.h"

namespace bench {

struct Timing {
    double best, median; // seconds for one call
    int calls;
};

// One call to warm up (pages, caches, prepared primitives), then calls for at least `seconds`, at least three.
template <class Call> Timing time_call(Call&& call, double seconds = 0.3) {
    using Clock = std::chrono::steady_clock;
    auto since = [](Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); };
    auto time_of = [&](int calls) {
        auto begin = Clock::now();
        for (int i = 0; i < calls; i++) call();
        wait();
        return since(begin) / calls;
    };
    time_of(1);
    const int together = calls_per_wait(time_of(1));
    std::vector<double> times;
    for (auto start = Clock::now(); times.size() < 3 || since(start) < seconds;) times.push_back(time_of(together));
    std::sort(times.begin(), times.end());
    return {times.front(), times[times.size() / 2], int(times.size()) * together};
}

// Memory as a kernel gets it from the arena.
class Buffer {
public:
    explicit Buffer(int64_t bytes) : bytes_(std::max<int64_t>((bytes + 63) / 64 * 64, 64)), data_(allocate(bytes_)) {}
    template <class T> explicit Buffer(const std::vector<T>& from) : Buffer(int64_t(from.size() * sizeof(T))) {
        upload(data_, from.data(), from.size() * sizeof(T));
    }
    ~Buffer() { release(data_, bytes_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    float* floats() { return as<float>(); }
    real* reals() { return as<real>(); }
    template <class T> T* as() { return static_cast<T*>(data_); }
    // The i-th of n elements becomes value(i), which any thread may be asked.
    template <class Value> void fill(int64_t n, Value&& value) {
        std::vector<real> host(n);
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n; i++) assign(host[i], value(i));
        upload(data_, host.data(), n * sizeof(real));
    }

private:
    int64_t bytes_;
    void* data_;
};

// FLOP/s of a large square product through the trainer's own matmul.
inline double matmul_ceiling() {
    const int64_t n = square_size();
    Buffer out(n * n * sizeof(real)), inp(n * n * sizeof(real)), w(n * n * sizeof(real));
    for (Buffer* b : {&inp, &w}) b->fill(n * n, [](int64_t i) { return float(i * 7919 % 251) / 125 - 1; });
    Matmul* mm = matmul_open(nullptr);
    Timing t = time_call([&] { matmul_forward(mm, out.reals(), nullptr, inp.reals(), w.reals(), nullptr, n, n, n); });
    matmul_close(mm);
    return matmul_forward_cost(n, n, n).flops / t.best;
}

// One aligned line a measurement. The percentage is best time against the binding ceiling: the larger of bytes over
// the bandwidth of the layer's own mix and FLOPs over the matmul rate.
class Table {
public:
    explicit Table(double matmul_rate = matmul_ceiling()) : matmul_rate_(matmul_rate) {
        std::printf("%s, %s, matmul ceiling %.0f GFLOP/s\n", kPrecision, machine().c_str(), matmul_rate_ / 1e9);
        std::printf("%-26s %-22s %10s %10s %8s %9s  %s\n", "layer", "shape", "best ms", "median ms", "GB/s", "GFLOP/s",
                    "of the ceiling");
    }

    void line(const std::string& name, const std::string& shape, Cost cost, Timing t) {
        double bandwidth = bandwidth_ceiling(cost.read, cost.written);
        double moving = cost.bytes() / bandwidth, computing = cost.flops / matmul_rate_;
        std::printf("%-26s %-22s %10.4f %10.4f %8.1f %9.1f  %3.0f%% of %s\n", name.c_str(), shape.c_str(), t.best * 1e3,
                    t.median * 1e3, cost.bytes() / t.best / 1e9, cost.flops / t.best / 1e9,
                    100 * std::max(moving, computing) / t.best,
                    moving > computing ? ("memory, " + std::to_string(int(bandwidth / 1e9)) + " GB/s").c_str()
                                       : "matmul");
        std::fflush(stdout);
    }

    template <class Call> void run(const std::string& name, const std::string& shape, Cost cost, Call&& call) {
        line(name, shape, cost, time_call(call));
    }

private:
    double matmul_rate_;
};

} // namespace bench
