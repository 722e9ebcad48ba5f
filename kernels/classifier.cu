// Softmax, cross-entropy and its gradient on the GPU: a block for each token, whose row of logits is read from memory
// once for the maximum and the sum together, and a second time, from L2, for the gradient.
//
// Exponents are kept in base 2: e^(x−max) = 2^(x·log2(e) − top) is one FMA and one instruction of the hardware. `top`
// need not be the maximum to the last digit, only one number for all terms, so its own rounding does not count.
#include "classifier.h"

#include <algorithm>

#include "common.h"
#include "device.h"
#include "launch.h"
#include "ptx.h"

namespace {

// 512 threads with 64 registers: two blocks on an SM, one reading while the other writes, and 2·132 rows of 100 KB
// (GPT-2's in bf16) fit the L2 of an H100 between the two reads.
constexpr int kThreads = 512;
constexpr int kWide = Pack128<real>::size;
constexpr int kUnroll = 4; // packs of a thread under way together: 64 bytes of 1024 threads hide the latency of an SM

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

// Σ 2^(x·log2(e) − top) over some logits; top is their largest, in base 2.
struct Softmax {
    float top = -INFINITY, sum = 0;
};

// What to subtract: `top`, but 0 if every logit is −∞, where −∞ − top would be NaN.
__device__ __forceinline__ float finite_top(float top) { return top == -INFINITY ? 0.f : top; }

// use(pack index, loaded packs) for each pack of a row that is this thread's: first kUnroll at once (index, + width,
// + 2·width, ...), their loads under way together, then single ones. Columns from V on are −∞, which changes neither
// maximum nor sum; only single packs have any, and only they pay for looking.
template <int N, class Use>
__device__ __forceinline__ void each_packs(const real* row, int64_t packs, int64_t V, Use use) {
    const int64_t width = blockDim.x, round = kUnroll * width, whole = V / N / round * round;
    int64_t i = threadIdx.x;
    for (; i < whole; i += round) {
        Pack<real, N> x[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) x[u] = load_pack<N>(row + (i + u * width) * N);
        use(i, x);
    }
    for (; i < packs; i += width) {
        Pack<real, N> x[1];
        if (i * N < V) x[0] = load_pack<N>(row + i * N);
#pragma unroll
        for (int j = 0; j < N; j++)
            if (i * N + j >= V) assign(x[0][j], -INFINITY);
        use(i, x);
    }
}

// Of a whole row, by the block; every thread gets the result. scratch: (2,32) floats.
template <int N> __device__ __forceinline__ Softmax softmax(const real* row, int64_t V, float* scratch) {
    Softmax mine;
    each_packs<N>(row, (V + N - 1) / N, V, [&]<int U>(int64_t, const Pack<real, N>(&x)[U]) {
        // fmaxf passes over NaN, so that `top` never is one; the sum is, and stays so.
        float largest = -INFINITY;
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int j = 0; j < N; j++) largest = fmaxf(largest, to_float(x[u][j]));
        if (largest * kLog2e > mine.top) {
            mine.sum *= exp2_approx(mine.top - largest * kLog2e);
            mine.top = largest * kLog2e;
        }
        const float top = finite_top(mine.top);
        float sums[U] = {}; // independent, so that no addition waits for the one before it
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int u = 0; u < U; u++) sums[u] += exp2_approx(fmaf(to_float(x[u][j]), kLog2e, -top));
#pragma unroll
        for (int u = 0; u < U; u++) mine.sum += sums[u];
    });
    Softmax all;
    all.top = block_max(mine.top, scratch);
    const float rescale = exp2_approx(mine.top - finite_top(all.top)); // 0 for a thread without logits
    all.sum = block_sum(mine.sum * rescale, scratch + 32);
    return all;
}

// The difference first: both terms may be large, and the logarithm is not.
__device__ __forceinline__ float loss_of(Softmax s, float target_logit) {
    return fmaf(-kLog2e, target_logit, s.top) * kLn2 + logf(s.sum);
}

template <int N> __global__ void __launch_bounds__(kThreads)
    forward(float* losses, const real* logits, const int32_t* targets, int64_t V, int64_t Vp) {
    float* scratch = reinterpret_cast<float*>(dynamic_shared()); // (2,32)
    const int64_t n = blockIdx.x;
    const real* row = logits + n * Vp; // (Vp)
    const int64_t target = load_global(targets + n);
    if (target < 0) {
        if (threadIdx.x == 0) store_global(losses + n, 0.f);
        return;
    }
    const Softmax s = softmax<N>(row, V, scratch);
    if (threadIdx.x == 0) store_global(losses + n, loss_of(s, to_float(load_global(row + target))));
}

template <int N> __global__ void __launch_bounds__(kThreads, 2)
    forward_backward(float* losses, real* logits, const int32_t* targets, float dloss, int64_t V, int64_t Vp) {
    float* scratch = reinterpret_cast<float*>(dynamic_shared()); // (2,32)
    const int64_t n = blockIdx.x, packs = Vp / N;
    real* row = logits + n * Vp; // (Vp)
    const int64_t target = load_global(targets + n);
    if (target < 0) {
        if (threadIdx.x == 0) store_global(losses + n, 0.f);
        Pack<real, N> zeros = {};
        for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) store_pack(row + i * N, zeros);
        return;
    }
    const float target_logit = to_float(load_global(row + target));
    const Softmax s = softmax<N>(row, V, scratch); // behind its barriers nobody needs the target's logit any more
    if (threadIdx.x == 0) store_global(losses + n, loss_of(s, target_logit));

    const float factor = dloss / s.sum, top = finite_top(s.top);
    auto weight = [&](float x) { return exp2_approx(fmaf(x, kLog2e, -top)); };
    each_packs<N>(row, packs, V, [&]<int U>(int64_t i, const Pack<real, N>(&x)[U]) { // e^−∞ is the padding's 0
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int64_t pack = i + u * blockDim.x;
            float d[N];
#pragma unroll
            for (int j = 0; j < N; j++) d[j] = weight(to_float(x[u][j])) * factor;
            store_pack(row + pack * N, round_pack<real>(d));
        }
    });
    // By the thread that has just written this element, so that the order is sure. Divided first: a target that is the
    // whole sum has gradient 0 to the last digit.
    if (threadIdx.x == target / N % blockDim.x) {
        real d;
        assign(d, (weight(target_logit) / s.sum - 1) * dloss);
        store_global(row + target, d);
    }
}

constexpr int kAddThreads = 1024;

__global__ void __launch_bounds__(kAddThreads)
    add_losses(double* total, const float* losses, double factor, int64_t N) {
    double sum = 0;
#pragma unroll 4
    for (int64_t n = threadIdx.x; n < N; n += kAddThreads) sum += load_global(losses + n);
    sum = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
    if (threadIdx.x == 0) store_global(total, load_global(total) + factor * sum);
}

constexpr size_t kScratch = 2 * 32 * sizeof(float);

// Whole warps, no more than have a pack.
unsigned threads_for(int64_t packs) {
    return static_cast<unsigned>(std::min<int64_t>(kThreads, (packs + kWarpSize - 1) / kWarpSize * kWarpSize));
}

} // namespace

void classifier_forward_backward(Stream stream, float* losses, real* logits, const int32_t* targets, float dloss,
                                 int64_t N, int64_t V, int64_t Vp) {
    if (N == 0) return;
    if (Vp % kWide == 0 && aligned(logits))
        launch(forward_backward<kWide>, blocks_for(N, 1), threads_for(Vp / kWide), kScratch, stream, losses, logits,
               targets, dloss, V, Vp);
    else
        launch(forward_backward<1>, blocks_for(N, 1), threads_for(Vp), kScratch, stream, losses, logits, targets, dloss,
               V, Vp);
}

void classifier_forward(Stream stream, float* losses, const real* logits, const int32_t* targets, int64_t N, int64_t V,
                        int64_t Vp) {
    if (N == 0) return;
    if (Vp % kWide == 0 && aligned(logits))
        launch(forward<kWide>, blocks_for(N, 1), threads_for(Vp / kWide), kScratch, stream, losses, logits, targets, V,
               Vp);
    else
        launch(forward<1>, blocks_for(N, 1), threads_for(Vp), kScratch, stream, losses, logits, targets, V, Vp);
}

void classifier_add_losses(Stream stream, double* total, const float* losses, double factor, int64_t N) {
    if (N == 0) return;
    launch(add_losses, 1, kAddThreads, 32 * sizeof(double), stream, total, losses, factor, N);
}
