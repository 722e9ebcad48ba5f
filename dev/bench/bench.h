// What the benches share: timing, and the ceilings that a layer's time is held against. Both ceilings are measured in
// the same run on the same threads, so that a figure means the same on any machine.
//
//   bench::Table table;
//   table.run("gelu forward", "256x3072", gelu_forward_cost(n), [&] { gelu_forward(...); })
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <omp.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../../kernels/common.h"
#include "../../kernels/math.h"
#include "../../kernels/matmul.h"

namespace bench {

struct Timing {
    double best, median; // seconds for one call
    int calls;
};

// One call to warm up (pages, caches, prepared primitives), then calls for at least `seconds`, at least three.
template <class Call> Timing time_call(Call&& call, double seconds = 0.3) {
    using Clock = std::chrono::steady_clock;
    auto since = [](Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); };
    call();
    std::vector<double> times;
    for (auto start = Clock::now(); times.size() < 3 || since(start) < seconds;) {
        auto begin = Clock::now();
        call();
        times.push_back(since(begin));
    }
    std::sort(times.begin(), times.end());
    return {times.front(), times[times.size() / 2], int(times.size())};
}

// Memory as a kernel gets it from the arena: aligned, and every page touched first by the thread that will use it.
class Buffer {
public:
    explicit Buffer(int64_t bytes) : bytes_((bytes + 63) / 64 * 64) {
        data_.reset(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(bytes_, 64))));
        if (!data_) std::fprintf(stderr, "bench: no memory for %.0f MB; run a smaller shape\n", bytes_ / 1e6), exit(1);
        parallel_ranges(bytes_, 64,
                        [&](int64_t begin, int64_t end, int) { memset(data_.get() + begin, 0, end - begin); });
    }
    float* floats() { return reinterpret_cast<float*>(data_.get()); }
    int64_t bytes() const { return bytes_; }

private:
    struct Free {
        void operator()(char* p) const { free(p); }
    };
    int64_t bytes_;
    std::unique_ptr<char, Free> data_;
};

// A store that does not first read the line it overwrites, where the machine has one.
inline void store_past_cache(float* p, Vec v) {
#if defined(__SSE2__)
    for (int i = 0; i < kLanes; i += 4) {
        __m128 quarter;
        memcpy(&quarter, reinterpret_cast<char*>(&v) + 4 * i, sizeof quarter);
        _mm_stream_ps(p + i, quarter);
    }
#else
    store(p, v);
#endif
}

// Bytes per second of the plainest loop that reads and writes as many bytes as the layer does: what its mix of streams
// can reach, in cache or in memory, whichever its size lands in. Above 1 GiB the buffers keep the mix and shrink.
// The faster of two ways to write counts: ordinary stores read each line before they overwrite it, which a layer that
// updates in place is spared; stores past the cache are spared it too, but never stay in cache.
inline double bandwidth_ceiling(double read_bytes, double written_bytes) {
    constexpr double kLargest = 1 << 30;
    constexpr int64_t kPiece = 4096; // bytes: reads and writes alternate in runs this long at most
    double shrink = std::min(1.0, kLargest / (read_bytes + written_bytes));
    Buffer from(int64_t(read_bytes * shrink)), to(int64_t(written_bytes * shrink));
    int64_t pieces = std::max(from.bytes(), to.bytes()) / kPiece + 1;
    std::vector<float> sums(omp_get_max_threads() * 16);

    auto stream = [&](auto write) {
        parallel_ranges(pieces, 1, [&](int64_t begin, int64_t end, int thread) {
            Vec sum[4] = {};
            for (int64_t piece = begin; piece < end; piece++) {
                Range r = split_range(from.bytes() / 4, pieces, piece, 4 * kLanes);
                const float* p = from.floats();
                for (int64_t i = r.begin; i + 4 * kLanes <= r.end; i += 4 * kLanes)
                    for (int j = 0; j < 4; j++) sum[j] += load(p + i + j * kLanes);
                Range w = split_range(to.bytes() / 4, pieces, piece, 4 * kLanes);
                float* q = to.floats();
                for (int64_t i = w.begin; i + kLanes <= w.end; i += kLanes) write(q + i, sum[0]);
            }
            sums[thread * 16] = ::sum(sum[0] + sum[1] + sum[2] + sum[3]); // so that no read is dropped as unused
        });
    };
    double seconds = time_call([&] { stream([](float* p, Vec v) { store(p, v); }); }, 0.1).best;
    if (written_bytes > 0) seconds = std::min(seconds, time_call([&] { stream(store_past_cache); }, 0.1).best);
    return double(from.bytes() + to.bytes()) / seconds;
}

// FLOP/s of a large square product through the trainer's own matmul.
inline double matmul_ceiling() {
    constexpr int64_t n = 2048;
    Buffer out(n * n * sizeof(real)), inp(n * n * sizeof(real)), w(n * n * sizeof(real));
    auto as_real = [](Buffer& b) { return reinterpret_cast<real*>(b.floats()); };
    Matmul* mm = matmul_open(nullptr);
    Timing t =
        time_call([&] { matmul_forward(mm, as_real(out), nullptr, as_real(inp), as_real(w), nullptr, n, n, n); });
    matmul_close(mm);
    return matmul_forward_cost(n, n, n).flops / t.best;
}

// One aligned line a measurement. The percentage is best time against the binding ceiling: the larger of bytes over
// the bandwidth of the layer's own mix and FLOPs over the matmul rate.
class Table {
public:
    explicit Table(double matmul_rate = matmul_ceiling()) : matmul_rate_(matmul_rate) {
        std::printf("%s, %d threads, matmul ceiling %.0f GFLOP/s\n", kPrecision, omp_get_max_threads(),
                    matmul_rate_ / 1e9);
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
