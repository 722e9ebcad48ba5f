#include "bench.h"

#include <cstring>

#include <omp.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../../kernels/common.h"
#include "../../kernels/math.h"
#include "../../runtime/device/memory.h"

namespace bench {

void* allocate(size_t bytes) {
    char* data = static_cast<char*>(device_alloc(bytes));
    parallel_ranges(bytes, 64, [&](int64_t begin, int64_t end, int) { memset(data + begin, 0, end - begin); });
    return data;
}
void release(void* pointer, size_t bytes) { device_free(pointer, bytes); }
void upload(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

void wait() {}
int calls_per_wait(double) { return 1; }
bool is_gpu() { return false; }
int64_t square_size() { return 2048; }

std::string machine() { return std::to_string(omp_get_max_threads()) + " threads"; }

// A store that does not first read the line it overwrites, where the machine has one.
static void store_past_cache(float* p, Vec v) {
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

// The faster of two ways to write counts: ordinary stores read each line before they overwrite it, which a layer that
// updates in place is spared; stores past the cache are spared it too, but never stay in cache.
double bandwidth_ceiling(double read_bytes, double written_bytes) {
    constexpr double kLargest = 1 << 30;
    constexpr int64_t kPiece = 4096; // bytes: reads and writes alternate in runs this long at most
    double shrink = std::min(1.0, kLargest / (read_bytes + written_bytes));
    const int64_t from_bytes = std::max<int64_t>(64, read_bytes * shrink),
                  to_bytes = std::max<int64_t>(64, written_bytes * shrink);
    Buffer from(from_bytes), to(to_bytes);
    int64_t pieces = std::max(from_bytes, to_bytes) / kPiece + 1;
    std::vector<float> sums(omp_get_max_threads() * 16);

    auto stream = [&](auto write) {
        parallel_ranges(pieces, 1, [&](int64_t begin, int64_t end, int thread) {
            Vec sum[4] = {};
            for (int64_t piece = begin; piece < end; piece++) {
                Range r = split_range(from_bytes / 4, pieces, piece, 4 * kLanes);
                const float* p = from.floats();
                for (int64_t i = r.begin; i + 4 * kLanes <= r.end; i += 4 * kLanes)
                    for (int j = 0; j < 4; j++) sum[j] += load(p + i + j * kLanes);
                Range w = split_range(to_bytes / 4, pieces, piece, 4 * kLanes);
                float* q = to.floats();
                for (int64_t i = w.begin; i + kLanes <= w.end; i += kLanes) write(q + i, sum[0]);
            }
            sums[thread * 16] = ::sum(sum[0] + sum[1] + sum[2] + sum[3]); // so that no read is dropped as unused
        });
    };
    double seconds = time_call([&] { stream([](float* p, Vec v) { store(p, v); }); }, 0.1).best;
    if (written_bytes > 0) seconds = std::min(seconds, time_call([&] { stream(store_past_cache); }, 0.1).best);
    return double(from_bytes + to_bytes) / seconds;
}

} // namespace bench
