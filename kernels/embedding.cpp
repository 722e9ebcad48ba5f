#include "embedding.h"

#include "common.h"
#include "math.h"

namespace {

// out (C) = a (C) + b (C), or a alone when b is null.
void add_rows(real* out, const real* a, const real* b, int64_t C) {
    int64_t c = 0;
    if (!b) {
        memcpy(out, a, C * sizeof(real));
        return;
    }
    for (; c + kLanes <= C; c += kLanes) store(out + c, load(a + c) + load(b + c));
    for (; c < C; c++) assign(out[c], to_float(a[c]) + to_float(b[c]));
}

// sum (n) += row (n)
void accumulate(float* sum, const real* row, int64_t n) {
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) store(sum + c, load(sum + c) + load(row + c));
    for (; c < n; c++) sum[c] += to_float(row[c]);
}

int64_t position_of(const EmbeddingShape& shape, int64_t n) {
    return shape.positions ? shape.positions[n] : shape.position0 + n % shape.T;
}

} // namespace

void embedding_forward(Stream, real* out, const int32_t* tokens, const real* wte, const real* wpe,
                       const EmbeddingShape& shape) {
    const int64_t C = shape.C;
    parallel_ranges(shape.B * shape.T, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; n++)
            add_rows(out + n * C, wte + tokens[n] * C, wpe ? wpe + position_of(shape, n) * C : nullptr, C);
    });
}

// Two tokens may share a row, so no two threads may add to the same element: threads are laid out as slices of the
// channels, and where there are more threads than slices worth having, as groups that own the rows of every so-many'th
// token and position. Whoever owns an element walks all tokens in order, so the sums do not depend on the threads.
void embedding_backward(Stream, float* dwte, float* dwpe, const real* dout, const int32_t* tokens, void*,
                        const EmbeddingShape& shape) {
    constexpr int64_t kNarrowest = 64; // channels: shorter runs would waste the memory's bursts and the prefetcher
    const int64_t C = shape.C, N = shape.B * shape.T;
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t slices = std::min(threads, std::max<int64_t>(C / kNarrowest, 1)), groups = threads / slices;
        const int64_t slice = thread % slices, group = thread / slices;
        const Range channels = split_range(C, slices, slice, kLanes);
        const int64_t width = channels.end - channels.begin;
        if (group < groups && width > 0)
            for (int64_t n = 0; n < N; n++) {
                const real* row = dout + n * C + channels.begin;
                if (tokens[n] % groups == group) accumulate(dwte + tokens[n] * C + channels.begin, row, width);
                if (!dwpe) continue;
                const int64_t p = position_of(shape, n);
                if (p % groups == group) accumulate(dwpe + p * C + channels.begin, row, width);
            }
    }
}
