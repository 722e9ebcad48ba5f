// What the CPU kernels share: how work is cut among threads, and how a broken precondition is told.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include <omp.h>

// A caller's mistake (a shape that no kernel takes), never a user's: those are checked where they enter.
inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

struct Range {
    int64_t begin, end;
};

// The part'th of `parts` nearly equal runs of [0, n), each but the last a multiple of `grain` long.
inline Range split_range(int64_t n, int64_t parts, int64_t part, int64_t grain = 1) {
    int64_t grains = (n + grain - 1) / grain;
    int64_t begin = grains * part / parts * grain, end = grains * (part + 1) / parts * grain;
    return {std::min(begin, n), std::min(end, n)};
}

// body(begin, end, thread) on every thread's run of [0, n): the same cut for the same thread count, so that sums over
// a thread's run are reproducible. An exception inside must not leave the region; kernels do not throw past here.
template <class Body> void parallel_ranges(int64_t n, int64_t grain, Body body) {
#pragma omp parallel
    {
        Range r = split_range(n, omp_get_num_threads(), omp_get_thread_num(), grain);
        if (r.begin < r.end) body(r.begin, r.end, omp_get_thread_num());
    }
}
