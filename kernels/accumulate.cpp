// A thread walks its range in runs that stay in the L1 cache: sums and noise on the stack, so that memory sees one
// pass.
#include "accumulate.h"

#include "optimizer.h"

namespace {

constexpr int kRun = 256;

void add_run(bf16* grads, float* staged, int count, uint64_t seed, uint64_t draw, uint64_t first_noise) {
    alignas(64) float sums[kRun];
    alignas(64) uint32_t words[kRun / 2];
    fill_noise(words, kRun / 8, seed, draw, first_noise);
#pragma omp simd
    for (int i = 0; i < count; i++) sums[i] = to_float(grads[i]) + staged[i], staged[i] = 0;
    round_by_noise<kRun>(grads, sums, words, count);
}

} // namespace

void accumulate_gradients(Stream, bf16* grads, float* staged, int64_t n, uint64_t seed, uint64_t stream_number,
                          const uint64_t* draw) {
    const uint64_t noise = accumulation_noise(n, stream_number), stream = *draw;
    parallel_ranges(n, kRun, [=](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i += kRun)
            add_run(grads + i, staged + i, int(std::min<int64_t>(end - i, kRun)), seed, stream, noise + i / 8);
    });
}
