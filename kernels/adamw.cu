// AdamW on the GPU: one pass, bound by memory. A thread takes two quads of neighbours, a block's width apart, so that
// each access of a warp is a run of whole sectors (eight neighbours a thread would write each sector in two halves),
// bf16 moves 8 bytes at a time. All loads, up to 128 bytes a thread, are under way at once: with 1024 threads an SM has
// 128 KB in flight, more than its latency asks for.
#include "adamw.h"

#include <cmath>
#include <type_traits>

#include "common.h"
#include "device.h"
#include "launch.h"

namespace {

constexpr int kThreads = 256;
constexpr int kQuads = 2; // of a thread

struct Arrays {
    real* params;       // (n)
    float* master;      // (n); only with kMaster
    float *m, *v;       // (n) each
    const float* grads; // (n)
    const float* scale; // (1)
    int64_t n;
};

struct Factors {
    float beta1, beta2, eps, step, unbias_v, keep;
    uint64_t seed, stream; // of the noise
};

// The new weight, not yet rounded; m and v are updated.
__device__ __forceinline__ float updated(float weight, float& m, float& v, float grad, float scale, const Factors& f) {
    const float g = scale * grad;
    m = f.beta1 * m + (1 - f.beta1) * g;
    v = f.beta2 * v + (1 - f.beta2) * (g * g);
    return weight * f.keep - f.step * m / (sqrtf(v * f.unbias_v) + f.eps);
}

// The noise of quad `quad`: half of what eight neighbours share.
__device__ __forceinline__ Philox quad_noise(const Factors& f, int64_t quad) {
    const Philox eight = philox(f.seed, f.stream, quad / 2);
    const bool upper = quad % 2 == 1;
    return {{upper ? eight.word[2] : eight.word[0], upper ? eight.word[3] : eight.word[1], 0, 0}};
}

// kAligned: every array starts at a multiple of 16 bytes.
template <bool kMaster, bool kAligned> __global__ void __launch_bounds__(kThreads) update(Arrays a, Factors f) {
    using Weight = std::conditional_t<kMaster, float, real>;
    Weight* weights;
    if constexpr (kMaster)
        weights = a.master;
    else
        weights = a.params;
    // Rounds the new weight p to where it belongs; params_at only with kMaster.
    auto put = [](Weight& weight, real& params_at, float p, const Philox& noise, int j) {
        if constexpr (kMaster)
            weight = p, assign(params_at, p);
        else
            assign_stochastically(weight, p, adamw_noise(noise, j));
    };

    const int64_t first_quad = int64_t(blockIdx.x) * kQuads * kThreads + threadIdx.x;
    Pack<Weight, 4> w[kQuads];
    Pack<float, 4> m[kQuads], v[kQuads], g[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
        const int64_t i = 4 * (first_quad + q * kThreads);
        if (!kAligned || i + 4 > a.n) continue;
        g[q] = load_pack<4>(a.grads + i), w[q] = load_pack<4>(weights + i);
        m[q] = load_pack<4>(a.m + i), v[q] = load_pack<4>(a.v + i);
    }
    const float scale = load_global(a.scale); // behind the other loads, so that none waits for the decision
    if (isnan(scale)) return;

#pragma unroll
    for (int q = 0; q < kQuads; q++) {
        const int64_t quad = first_quad + q * kThreads, i = 4 * quad;
        Philox noise = {};
        if constexpr (!kMaster && sizeof(real) == 2) noise = quad_noise(f, quad);
        if (kAligned && i + 4 <= a.n) {
            Pack<real, 4> rounded;
#pragma unroll
            for (int j = 0; j < 4; j++)
                put(w[q][j], rounded[j], updated(to_float(w[q][j]), m[q][j], v[q][j], g[q][j], scale, f), noise, j);
            store_pack(a.m + i, m[q]), store_pack(a.v + i, v[q]), store_pack(weights + i, w[q]);
            if constexpr (kMaster) store_pack(a.params + i, rounded);
        } else {
            for (int j = 0; j < 4 && i + j < a.n; j++) {
                const int64_t k = i + j;
                put(weights[k], a.params[k], updated(to_float(weights[k]), a.m[k], a.v[k], a.grads[k], scale, f), noise,
                    j);
            }
        }
    }
}

} // namespace

void adamw_update(Stream stream, real* params, float* master, float* m, float* v, const float* grads,
                  const float* scale, int64_t n, const AdamW& opt) {
    require(opt.t >= 1, "adamw_update: t counts from 1");
    if (n == 0) return;
    const Arrays arrays{params, master, m, v, grads, scale, n};
    // In double: 1 − β2ᵗ in float loses half its digits for β2 = 0.999 and small t.
    const Factors factors{opt.beta1,
                          opt.beta2,
                          opt.eps,
                          float(opt.lr / (1 - std::pow(double(opt.beta1), double(opt.t)))),
                          float(1 / (1 - std::pow(double(opt.beta2), double(opt.t)))),
                          float(1 - double(opt.lr) * opt.weight_decay),
                          opt.seed,
                          adamw_stream(opt)};
    const bool wide = aligned(params) && aligned(master) && aligned(m) && aligned(v) && aligned(grads);
    auto run = [&](auto kernel) {
        launch(kernel, blocks_for(n, 4 * kQuads * kThreads), kThreads, 0, stream, arrays, factors);
    };
    if (master)
        run(wide ? update<true, true> : update<true, false>);
    else
        run(wide ? update<false, true> : update<false, false>);
}
