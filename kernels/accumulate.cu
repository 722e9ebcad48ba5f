// One pass, bound by memory. A lane takes quads of neighbours, a block's width apart, so that each access of a warp is
// a run of whole sectors: 16 bytes a lane of the floats, which are two thirds of the bytes, and 8 of bf16. (Eight
// neighbours a lane would take 16 bytes of each, but write every sector of floats in two halves.)
#include "accumulate.h"

#include "device.h"
#include "launch.h"
#include "optimizer.h"

namespace {

constexpr int kThreads = 256;
constexpr int kQuads = 2; // of a lane: 48 bytes of loads under way, 96 KB on an SM with 2048 threads

__global__ void __launch_bounds__(kThreads) add_rounded(bf16* grads, float* staged, int64_t n, uint64_t seed,
                                                        uint64_t first_noise, const uint64_t* draw, bool aligned) {
    const int64_t first = 4 * (int64_t(blockIdx.x) * kQuads * kThreads + threadIdx.x);
    Pack<bf16, 4> g[kQuads];
    Pack<float, 4> s[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
        const int64_t i = first + 4 * q * kThreads;
        const bool whole = aligned && i + 4 <= n;
        s[q] = load_quad(staged, i, n, whole), g[q] = load_quad(grads, i, n, whole);
    }
    const uint64_t stream = load_global(draw);
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
        const int64_t i = first + 4 * q * kThreads;
        if (i >= n) break;
        const bool whole = aligned && i + 4 <= n;
        const Philox noise = quad_noise(seed, stream, first_noise, i);
#pragma unroll
        for (int j = 0; j < 4; j++) g[q][j] = round_stochastically(to_float(g[q][j]) + s[q][j], noise_half(noise, j));
        store_quad(grads, g[q], i, n, whole), store_quad(staged, {}, i, n, whole);
    }
}

} // namespace

void accumulate_gradients(Stream stream, bf16* grads, float* staged, int64_t n, uint64_t seed, uint64_t stream_number,
                          const uint64_t* draw) {
    const uint64_t noise = accumulation_noise(n, stream_number);
    if (n == 0) return;
    launch(add_rounded, blocks_for(n, 4 * kQuads * kThreads), kThreads, 0, stream, grads, staged, n, seed, noise, draw,
           aligned(grads) && aligned(staged));
}
